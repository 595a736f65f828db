"""AdaBN: the batch norms of a trained model get the statistics of another domain, over all batches of all ranks.

Each batch is normalised by itself while it is measured, so what a rank finds does not depend on its batches' order or on
the other ranks; one merge at the end gives every rank what one process would have found with all the batches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.calibration._layers import (
    Forward,
    batch_norms,
    call_with_first_tensor,
    evaluated_by,
    first_tensor,
    unwrap,
)
from syncnorm.core.features import add_moments
from syncnorm.core.layout import flatten
from syncnorm.core.moments import Moments, empty_moments, merge_moments
from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.kernels import choose

__all__ = ["adapt_batch_norm"]


def adapt_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    process_group: object = "world",
) -> int:
    """Replace the running statistics of every batch norm by those of ``batches``, as for a new domain (AdaBN).

    The model runs in evaluation mode without gradients, each batch norm normalising every batch by that batch's own
    statistics and adding them to the domain's: mean, and unbiased variance, over all samples of all batches of all ranks. A
    layer that is called several times pools all its calls. Weights, counters, training flags and everything else stay as
    they are; no labels are read. Ours, torch's and ``nn.SyncBatchNorm`` are treated alike, and so is
    :class:`~syncnorm.modules.BatchRenorm2d`, whose correction is off in evaluation.

    Ranks may have different numbers of batches, and none, and meet once at the end (not so under FSDP, where forwards
    meet). The result is that of one process with the batches of all ranks; how samples are divided into batches matters
    for all but the first batch norm, so batches should be as large and as mixed as they can be.

    Args:
        model: Any model; one wrapped in DDP or ``torch.compile`` too.
        batches: An iterable, such as a DataLoader, of inputs or of tuples or lists that begin with one.
        forward: How the model is called, ``forward(model, batch)``; by default with the input, on its device.
        process_group: The ranks whose batches make up the domain, as in :class:`syncnorm.SyncBatchNorm`.

    Returns:
        Number of samples, over all ranks: the sum of the sizes of dim 0 of each batch's first tensor.

    Raises:
        ValueError: If no rank has a sample; if the model has no batch norm with running statistics; if a layer gets one
            value per channel, or samples that are not finite. Nothing has changed then.
        TypeError: If a batch is not a tensor and does not begin with one, and ``forward`` is not given.
        SyncNormMismatch: If another rank raised an error over its batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> adapt_batch_norm(model, torch.randn(100, 2).split(25))
        100

    Reference: Li et al. (2016), arXiv:1603.04779, section 3.2.
    """
    model = unwrap(model)
    layers = {name: layer for name, layer in batch_norms(model).items() if layer.running_mean is not None}
    if not layers:
        raise ValueError(
            "adapt_batch_norm needs a batch norm with running statistics, and the model has none. One with "
            "track_running_stats=False uses each batch's own statistics and needs no adaptation."
        )
    group = resolve(group_spec(process_group))
    num_words = 1 + sum(2 * layer.num_features + 1 for layer in layers.values())
    try:
        num_samples, moments = _measure(model, layers, batches, forward or call_with_first_tensor)
        row = torch.cat([torch.tensor([float(num_samples)], dtype=torch.float64), *(_row(m) for m in moments)])
    except Exception:
        send_refusal(num_words, torch.device("cpu"), group)
        raise
    rows = gather_rows(row, group)
    total = int(rows[:, 0].sum())
    if not total:
        raise ValueError(
            "adapt_batch_norm needs at least one sample on some rank, got none. Check the loaders' lengths."
        )
    _write(layers, rows[:, 1:])
    return total


def _measure(
    model: nn.Module, layers: dict[str, _BatchNorm], batches: Iterable[Any], forward: Forward
) -> tuple[int, list[Moments]]:
    """Run all batches; how many samples they had, and each layer's moments. The model is as before afterwards."""
    found = {name: empty_moments(layer.num_features, torch.device("cpu")) for name, layer in layers.items()}
    training = [(module, module.training) for module in model.modules()]
    statistics = [(layer, layer.running_mean, layer.running_var) for layer in layers.values()]
    handles: list[Any] = []
    num_samples = 0
    try:
        for module, _ in training:
            module.training = False  # not eval(), which a model may have given another meaning
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_hook(name, found), with_kwargs=True))
        # A compiled model runs as it was written: compiled code does not see hooks that came later.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                x = first_tensor(batch)
                num_samples += 0 if x is None or x.dim() == 0 else x.size(0)
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for layer, mean, var in statistics:
            layer._buffers.update(running_mean=mean, running_var=var)
        for module, mode in training:
            module.training = mode
    return num_samples, list(found.values())


def _hook(name: str, found: dict[str, Moments]) -> Any:
    def measure(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (args or tuple(kwargs.values()))[0]
        if x.dim() < 2 or x.size(1) != layer.num_features or not x.numel():
            return  # the layer itself says what is wrong; of an empty batch there is nothing to measure
        flat = flatten(x)
        batch = choose("auto", x).batch_moments(flat)
        if batch.count == 1:
            raise ValueError(
                f"{name} ({type(layer).__name__}) got one value per channel, {list(x.shape)}, which has no variance. Use "
                "larger batches, or drop_last=True if it is the last one."
            )
        # Lent to the layer: evaluation by these is normalisation by the batch, in every batch norm there is.
        mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
        lent_mean, lent_var = evaluated_by(layer, batch, batch.var)
        layer._buffers.update(running_mean=lent_mean.to(mean), running_var=lent_var.to(var))
        on_host = Moments(float(batch.count), batch.mean.cpu(), batch.m2.cpu())
        found[name] = add_moments(found[name], on_host)

    return measure


def _row(moments: Moments) -> Tensor:
    return torch.cat([moments.mean.new_full((1,), float(moments.count)), moments.mean, moments.m2])


@torch.no_grad()
def _write(layers: dict[str, _BatchNorm], rows: Tensor) -> None:
    """Give each layer the merged moments of its columns, in place; a layer that no rank has called keeps its own."""
    widths = [2 * layer.num_features + 1 for layer in layers.values()]
    merged = []
    for name, columns in zip(layers, rows.split(widths, dim=1), strict=True):
        means, m2s = columns[:, 1:].unflatten(1, (2, -1)).unbind(1)
        moments = merge_moments(Moments(columns[:, 0], means, m2s))
        if not (moments.mean.isfinite() & moments.m2.isfinite()).all():
            raise ValueError(
                f"the inputs of {name} hold NaN or infinite values on some rank, so they have no statistics. Nothing was "
                "changed. Clean the data first."
            )
        merged.append(moments)
    for layer, moments in zip(layers.values(), merged, strict=True):
        if moments.count > 0 and layer.running_mean is not None and layer.running_var is not None:
            mean, var = evaluated_by(layer, moments, moments.unbiased_var)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
