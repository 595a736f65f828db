"""For a while: without the other ranks, or without touching the running statistics."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm.modules import BatchNorm, SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics
from syncnorm.modules._over_ranks import OverRanks

__all__ = ["disabled", "no_stats_update"]

_Model = TypeVar("_Model", bound=nn.Module)
_MEETING = (SyncStatistics, OverRanks)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# In training these do without running statistics where track_running_stats is off.
_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm)


@contextmanager
def disabled(model: _Model) -> Iterator[_Model]:
    """Within, our layers use the statistics of this rank alone and meet nobody; afterwards they do as before.

    For a forward that only some ranks make, such as a sanity check on rank 0. May be nested.

    Args:
        model: Whatever holds the layers.

    Yields:
        ``model``.

    Example:
        >>> with syncnorm.disabled(model):  # doctest: +SKIP
        ...     model(example)
    """
    before = [(module, module._sync) for module in model.modules() if isinstance(module, _MEETING)]
    try:
        for module, _ in before:
            module._sync = False
        yield model
    finally:
        for module, sync in before:
            if isinstance(module, _MEETING):  # it may have been reverted meanwhile
                module._sync = sync


@contextmanager
def no_stats_update(model: _Model) -> Iterator[_Model]:
    """Within, training forwards normalise as always and leave running statistics and counters as they are.

    For the second pass of SAM, extra forwards of a GAN, and the like. Covers every batch norm, ours, torch's and
    others', the BatchNormLSTM, a RunningNorm's forward, and instance norms that track statistics; micro-batches gathered by
    ``accumulate`` too. May be nested.

    Args:
        model: Whatever holds the layers.

    Yields:
        ``model``.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, SyncStatistics | MixedStatistics) or type(module) in _KNOWN:
                stack.callback(setattr, module, "track_running_stats", module.track_running_stats)
                setattr(module, "track_running_stats", False)  # noqa: B010 - a Tensor or Module, say the stubs
            elif isinstance(module, OverRanks):
                stack.callback(setattr, module, "_tracks", module._tracks)
                module._tracks = False
            elif isinstance(module, _BatchNorm | _InstanceNorm):
                for handle in _lend_copies(module):
                    stack.callback(handle.remove)
        yield model


def _lend_copies(module: nn.Module) -> list[Any]:
    """Hooks that give ``forward`` copies of the statistics to write to, for layers whose code we do not know."""
    originals: list[dict[str, Any]] = []

    def lend(module: nn.Module, _: Any) -> None:
        kept = {name: buffer for name in _STATISTICS if (buffer := module._buffers.get(name)) is not None}
        originals.append(kept)
        if module.training:
            module._buffers.update({name: buffer.clone() for name, buffer in kept.items()})

    def take_back(module: nn.Module, *_: Any) -> None:
        if originals:
            module._buffers.update(originals.pop())

    return [module.register_forward_pre_hook(lend), module.register_forward_hook(take_back, always_call=True)]
