"""Running statistics that ranks hold apart, pooled over the ranks of a group in one meeting."""

# R ranks, C channels

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from syncnorm.core.running import pool_running
from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import Group
from syncnorm.errors import SyncNormMismatch
from syncnorm.modules._state_faults import state_faults

__all__ = ["STATISTICS", "pool_statistics"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def pool_statistics(layers: Mapping[str, nn.Module], group: Group) -> None:
    """Give every rank the mixture of all ranks' statistics (:func:`~syncnorm.core.running.pool_running`), the same bits.

    Args:
        layers: Layers with ``running_mean`` and ``running_var`` [C], by name; the same on all ranks.
        group: The ranks that meet.

    Raises:
        ValueError: If a statistic on this rank is not finite, or a variance or counter is negative. Nothing has changed.
        SyncNormMismatch: If that is so on another rank, or ranks have different layers. Nothing has changed.
    """
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
    widths = [2 * _num_features(layer) + 1 for layer in layers.values()]
    for layer, columns in zip(layers.values(), rows[:, 1:].split(widths, dim=1), strict=True):
        _write(layer, columns)


def _num_features(layer: nn.Module) -> int:
    return layer.get_buffer("running_mean").numel()


def _structure(layers: Mapping[str, nn.Module]) -> Tensor:
    text = repr([(name, _num_features(layer), layer.momentum is None) for name, layer in layers.items()])
    return torch.tensor([float(zlib.crc32(text.encode()))], dtype=torch.float64)


def _row(name: str, layer: nn.Module) -> Tensor:
    """``[n, mean, var]`` of a layer, with n the batches it has seen, or 1 where it does not count them."""
    faults = state_faults(layer, {key: value for key, value in layer._buffers.items() if key in STATISTICS})
    if faults:
        what = "; ".join(f"{key} {fault}" for key, fault in faults.items())
        raise ValueError(
            f"{name} ({type(layer).__name__}): {what}, which would spread to all ranks. Nothing was changed. "
            "layer.reset_running_stats() starts its statistics again."
        )
    mean, var, counter = (layer._buffers.get(key) for key in STATISTICS)
    assert mean is not None and var is not None
    parts = (mean.new_ones(1) if counter is None else counter, mean, var)
    return torch.cat([part.detach().flatten().cpu().double() for part in parts])


def _write(layer: nn.Module, columns: Tensor) -> None:
    counts_R = columns[:, 0]
    means_RC, vars_RC = columns[:, 1:].tensor_split(2, dim=1)
    weights_R = counts_R if layer.momentum is None else counts_R.sign()
    pooled = (*pool_running(means_RC, vars_RC, weights_R), counts_R.max())
    for key, value in zip(STATISTICS, pooled, strict=True):
        buffer = layer._buffers.get(key)
        if buffer is not None:
            buffer.copy_(value)
