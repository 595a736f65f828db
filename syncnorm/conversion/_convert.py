"""A model's batch norms become synchronised, or another kind of norm, in place, after everything has been checked."""

import warnings
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from syncnorm.conversion._filters import swap_filters
from syncnorm.conversion._layers import display
from syncnorm.conversion._plan import Plan, plan, shorten, skipped_text
from syncnorm.conversion._replace import around, blueprint, build_replacement, like_tensor, put
from syncnorm.conversion._select import Patterns
from syncnorm.conversion._targets import TARGETS, default_of
from syncnorm.conversion._validate import refuse_broken
from syncnorm.modules import SyncStatistics

__all__ = ["convert"]

_Model = TypeVar("_Model", bound=nn.Module)  # a model that is itself a norm may come back as another


def convert(
    model: _Model,
    to: str = "sync_batch_norm",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    process_group: object = None,
    strict: bool = False,
    **options: Any,
) -> _Model:
    """Convert the batch norms of a model, in place; :func:`syncnorm.revert` undoes it exactly.

    To a family of batch statistics (``"sync_batch_norm"``, ``"batch_renorm"``, ``"ghost_batch_norm"``,
    ``"moving_average_batch_norm"``, ``"frozen_batch_norm"``) a layer stays the same object and changes its class:
    parameters, buffers, hooks, names, training flags and every reference to it stay. It works before and after DDP, under
    FSDP and with ``torch.compile``, any number of times. To another kind of norm, a new module takes the place of the old
    one under every name it has. Weight, bias and running statistics are the same objects where the new layer has them, eps
    and momentum the same numbers, hooks stay, and a batch norm's checkpoint still loads; :func:`syncnorm.plan` tells layer
    by layer what is new and what is dropped.

    Only layers of exactly a known class are touched: ``nn.BatchNorm1d/2d/3d``, ``nn.SyncBatchNorm``, ours, what
    ``Trainer(sync_batchnorm=True)`` leaves, and what :func:`syncnorm.register_adapter` was told. One warning names
    the batch norms that were left. Group, layer and instance norms are nobody's batch norm and stay.

    Args:
        model: Any module; also one that is itself a batch norm.
        to: ``"sync_batch_norm"``; ``"batch_renorm"``; ``"ghost_batch_norm"``; ``"moving_average_batch_norm"``;
            ``"frozen_batch_norm"``; ``"group_norm"``; ``"layer_norm"`` (over channels and space, as a group norm of one
            group: right for any rank of input); ``"instance_norm"`` (without running statistics); ``"rms_norm"`` (over the
            channels of each position); ``"dynamic_tanh"``; ``"switchable_norm"``; ``"batch_instance_norm"``; or, which
            replace the activation that follows too and leave it to you to remove that, ``"filter_response_norm"`` (with its
            TLU), ``"evo_norm_b0"``, ``"evo_norm_s0"``.
        include: Convert only these: a glob on the qualified name (``*`` matches dots too; the ``module.`` of DDP and
            the like may be left out), a module type, a callable ``(name, module) -> bool``, or a sequence of them.
            None means all.
        exclude: Leave these; as ``include``, and stronger.
        process_group: Which ranks share statistics, as in :class:`syncnorm.SyncBatchNorm`. None means all ranks, and
            for a layer that has a group, that one. Only where statistics are of a batch.
        strict: Raise, and change nothing, where a layer would be left with a warning.
        **options: What the constructor of the new layer takes and a batch norm does not bring along. For example
            ``backend`` and ``accumulate`` for ``"sync_batch_norm"``, ``r_max`` and ``d_max`` for ``"batch_renorm"``,
            ``virtual_batch_size``, which ``"ghost_batch_norm"`` needs, ``alpha`` for ``"dynamic_tanh"``, ``tlu=False`` for
            ``"filter_response_norm"``. ``num_groups=32`` for ``"group_norm"`` and ``"evo_norm_s0"``: where it does not
            divide the channels, the greatest common divisor is taken and said. ``weight_standardization=True`` for
            ``"group_norm"`` and ``weight_centralization=True`` for ``"moving_average_batch_norm"``: every
            ``nn.Conv1d/2d/3d`` that the globs of ``include`` and ``exclude`` select becomes a
            :class:`syncnorm.modules.WeightStandardizedConv2d` or ``WeightCentralizedConv2d``, with the same parameters and
            keys. ``fuse=True``, where the new layer can apply an activation: norms take in the activation and the sum that
            follow them, as :func:`syncnorm.plan` tells; see ``docs/conversion.md``. ``affine=None``, where the
            new layer leaves the choice: a weight and bias where the layer has them; True adds, False drops them.

    Returns:
        ``model``. Only where the model is itself a batch norm and converted to a norm without a batch, the new
        module.

    Raises:
        ValueError: For an unknown target, a value out of range, or a pattern that matches nothing; or if a layer's running
            statistics are not finite, or a variance or counter is negative.
        TypeError: For an option that the target does not take, or an argument of the wrong type.
        SyncNormError: If a wrapper around the model forbids the change, or with ``strict`` a layer would be left.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(syncnorm.convert(model)[1])
        <class 'syncnorm.modules._sync_batch_norm.SyncBatchNorm2d'>
    """
    made = plan(model, to, include=include, exclude=exclude, process_group=process_group, strict=strict, **options)
    refuse_broken(made)
    _warn(made)
    root: nn.Module = model
    replaced = {id(entry._layer.module) for entry in made.entries if entry.action == "replace"}
    like = {
        id(e._layer.module): (like_tensor(e._layer, model), around(e._layer, model, replaced)) for e in made.entries
    }
    with torch.inference_mode(False):  # what is made here is trained
        for entry in made.entries:
            module = entry._layer.module
            if entry.action == "swap" and isinstance(module, _ConvNd):
                swap_filters(module, made.options)
            elif entry.action == "swap":
                settings = {name: value for name, value in made.options.items() if name in TARGETS[to].parameters}
                cast(type[SyncStatistics], entry._verdict.layer).adopt(module, **settings)
            elif entry.action == "replace":
                replacement = blueprint(module, to, made.options)
                assert replacement is not None
                new = build_replacement(module, replacement, *like[id(module)])
                put(entry._layer.places, new)
                root = new if module is model else root
    for name, module in root.named_modules():
        if isinstance(module, SyncStatistics):
            module._path = name  # by which ranks are told apart
    for block in made._blocks:
        block.install()
    return cast(_Model, root)


def _warn(made: Plan) -> None:
    texts = []
    if not made.entries:
        texts.append("the model has no batch norm; nothing was converted.")
    skipped = [entry for entry in made.entries if entry.action == "skip"]
    if skipped:
        texts.append(f"left {len(skipped)} as they were:\n{skipped_text(skipped)}")
    coarser = [entry for entry in made.entries if entry.action == "replace" and "does not divide" in entry.reason]
    if coarser:
        asked = made.options.get("num_groups", default_of(made.to, "num_groups"))
        became = shorten([f"{display(entry.name)} → {entry.target}" for entry in coarser])
        texts.append(
            f"num_groups={asked} does not divide the channels of every layer; the greatest common divisor does: "
            f"{became}."
        )
    active = [
        e for e in made.entries if e.action == "replace" and "activates too" in e.reason and "takes in" not in e.reason
    ]
    if active:
        kind = active[0].target.partition("(")[0]
        texts.append(
            f"{kind} is a norm and an activation in one. Remove the activation that followed "
            f"{shorten([display(entry.name) for entry in active])}; syncnorm does not."
        )
    for text in texts:
        warnings.warn(f"syncnorm.convert(to={made.to!r}): {text}", UserWarning, stacklevel=3)
