"""Running statistics that ranks gathered each on its own become those of all their data.

The mean over ranks of their variances would forget how far the ranks' means lie apart. The law of total variance does not.
"""

# R ranks, C channels

import zlib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.calibration._layers import batch_norms, unwrap
from syncnorm.core.running import pool_running
from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.errors import SyncNormMismatch
from syncnorm.modules._state_faults import state_faults

__all__ = ["reduce_buffers"]

_POOLED = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def reduce_buffers(model: nn.Module, *, process_group: object = "world") -> int:
    """Give every rank the running statistics of all ranks, pooled. For plain batch norms, before validation or saving.

    Each batch norm's running mean becomes the mean over ranks, its running variance the mean of the variances plus the
    variance of the means (law of total variance), as if the ranks' batches had been seen as one population. Ranks count
    equally, since an exponential average remembers the same number of batches everywhere; for ``momentum=None``, a
    cumulative average, they count by ``num_batches_tracked``; a rank that has seen no batch does not count. The counter
    becomes the largest. Every rank holds the same bits afterwards, and where ranks agreed already nothing changes.

    Nothing but ``running_mean``, ``running_var`` and ``num_batches_tracked`` is written. nn.BatchNorm, ``nn.SyncBatchNorm``
    and ours are treated alike; ours hold equal statistics anyway, unless their groups are smaller than ``process_group``.
    Every rank must call this. It is one gather of 2C + 1 float64 words for each layer, or two: the first 2 kB travel alone,
    so that ranks with different models meet there and raise.

    Args:
        model: Any model; one wrapped in DDP too.
        process_group: The ranks to pool over, as in :class:`syncnorm.SyncBatchNorm`.

    Returns:
        Number of layers pooled: those with running statistics.

    Raises:
        ValueError: If a statistic on this rank is not finite, or a variance or counter is negative. Nothing has changed then.
        SyncNormMismatch: If that is so on another rank, or ranks have different layers. Nothing has changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> syncnorm.reduce_buffers(model)
        1

    Reference: Var X = E[Var(X|rank)] + Var(E[X|rank]).
    """
    layers = {
        n: layer for n, layer in batch_norms(unwrap(model)).items() if layer._buffers.get("running_mean") is not None
    }
    group = resolve(group_spec(process_group))
    try:
        row = torch.cat([_structure(layers), *(_row(name, layer) for name, layer in layers.items())])
    except Exception:
        send_refusal(0, torch.device("cpu"), group)
        raise
    rows = gather_rows(row, group)
    if (rows[:, 0] != rows[0, 0]).any():
        raise SyncNormMismatch(
            "ranks must have the same batch norms in the same order, and their names, channels or momentum differ. Nothing was "
            f"changed. On this rank there are {len(layers)}: {list(layers)[:6]}{' …' if len(layers) > 6 else ''}."
        )
    widths = [2 * layer.num_features + 1 for layer in layers.values()]
    for layer, columns in zip(layers.values(), rows[:, 1:].split(widths, dim=1), strict=True):
        _write(layer, columns)
    return len(layers)


def _structure(layers: dict[str, _BatchNorm]) -> Tensor:
    text = repr([(name, layer.num_features, layer.momentum is None) for name, layer in layers.items()])
    return torch.tensor([float(zlib.crc32(text.encode()))], dtype=torch.float64)


def _row(name: str, layer: _BatchNorm) -> Tensor:
    """``[n, mean, var]`` of a layer, with n the batches it has seen, or 1 where it does not count them."""
    faults = state_faults(layer, {key: value for key, value in layer._buffers.items() if key in _POOLED})
    if faults:
        what = "; ".join(f"{key} {fault}" for key, fault in faults.items())
        raise ValueError(
            f"{name} ({type(layer).__name__}): {what}, which would spread to all ranks. Nothing was changed. "
            "layer.reset_running_stats() starts its statistics again."
        )
    mean, var, counter = (layer._buffers.get(key) for key in _POOLED)
    assert mean is not None and var is not None
    parts = (mean.new_ones(1) if counter is None else counter, mean, var)
    return torch.cat([part.detach().flatten().cpu().double() for part in parts])


def _write(layer: _BatchNorm, columns: Tensor) -> None:
    counts_R = columns[:, 0]
    means_RC, vars_RC = columns[:, 1:].tensor_split(2, dim=1)
    weights_R = counts_R if layer.momentum is None else counts_R.sign()
    pooled = (*pool_running(means_RC, vars_RC, weights_R), counts_R.max())
    for key, value in zip(_POOLED, pooled, strict=True):
        buffer = layer._buffers.get(key)
        if buffer is not None:
            buffer.copy_(value)
