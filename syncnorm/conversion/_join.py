"""Uneven epochs: ranks that run out of data earlier than others, with synchronised layers in the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from syncnorm.distributed.collectives import is_initialized
from syncnorm.distributed.groups import Group, GroupSpec
from syncnorm.distributed.join import Join, Joinable, StandIn, forget_twin, twin_of
from syncnorm.distributed.ledger import check_level
from syncnorm.errors import SyncNormError
from syncnorm.modules import SyncStatistics
from syncnorm.modules._over_ranks import OverRanks

__all__ = ["join"]

_Model = TypeVar("_Model", bound=nn.Module)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def join(model: _Model, **options: Any) -> Iterator[_Model]:
    """Within, ranks may train for different numbers of steps: one that has run out of data answers the others meanwhile.

    It answers with a count of zero, so that the statistics and gradients of a step are those of the ranks that still have
    data; afterwards all have the running statistics of the one that trained longest. Where ``model`` is a
    ``DistributedDataParallel``, its own join runs within this one, which alone a model with synchronised layers cannot use.
    Statistics go over process groups of their own meanwhile. Every forward of ``model`` in train mode counts as a step.

    Without this context ranks that come no more leave the others waiting, until the time limit of the group or of
    :func:`syncnorm.set_watch`, which names them.

    Args:
        model: All ranks enter with the same model; wrapped or not.
        **options: For DDP's ``join``, such as ``divide_by_initial_world_size``.

    Yields:
        ``model``.

    Raises:
        SyncNormError: If checks are ``"off"``, since the rows then do not say how long they are; or if the model has other
            layers of ours that meet ranks, such as a SwitchableNorm or ghosts that join ranks; or, on a rank that answers,
            if one that still has data ends.

    Example:
        >>> with syncnorm.join(ddp_model):  # doctest: +SKIP
        ...     for x, y in loader:
        ...         loss(ddp_model(x), y).backward()
    """
    if check_level() == "off":
        raise SyncNormError("syncnorm.join needs to know the length of rows: use syncnorm.set_check('inline').")
    others = [name for name, m in model.named_modules() if isinstance(m, OverRanks) or _joins_ranks(m)]
    if others:
        raise SyncNormError(
            f"syncnorm.join does not know how to stand in for {others[:5]}, which meet ranks in ways of their own. Give all "
            "ranks equally many batches."
        )
    if not is_initialized():  # a lone process has nobody to wait for
        yield model
        return
    layers = [m for m in model.modules() if isinstance(m, SyncStatistics) and m._sync]
    before = [(layer, layer._group_spec) for layer in layers]
    specs: dict[GroupSpec, Any] = {}
    for _, spec in before:
        if spec not in specs:
            specs[spec] = twin_of(spec)
    tensor = next(iter(model.parameters()), torch.empty(0))
    buffers: dict[Group, list[Tensor]] = {group: [] for _, group in specs.values() if group.size > 1}
    for layer, spec in before:
        if specs[spec][1] in buffers:
            buffers[specs[spec][1]] += [b for name, b in layer.named_buffers() if name in _STATISTICS]
    joinables: list[Joinable] = [StandIn(buffers, tensor.device)]
    if isinstance(model, Joinable):
        joinables.append(model)
    stand_in = joinables[0]
    assert isinstance(stand_in, StandIn)
    step = model.register_forward_pre_hook(lambda module, _: stand_in.notify() if module.training else None)
    try:
        for layer, spec in before:
            layer._group_spec = specs[spec][0]
        with Join(joinables, **options):
            yield model
    except BaseException as error:
        for spec in specs:
            forget_twin(spec)
        if isinstance(error, RuntimeError) and (found := stand_in.failure()):  # torch's own error names nobody
            raise found from error
        raise
    finally:
        step.remove()
        for layer, spec in before:
            layer._group_spec = spec


def _joins_ranks(module: nn.Module) -> bool:
    return getattr(module, "_ranks_per_ghost", 1) != 1
