"""Running statistics that ranks gathered each on its own become those of all their data.

The mean over ranks of their variances would forget how far the ranks' means lie apart. The law of total variance does not.
"""

from torch import nn

from syncnorm.calibration._layers import batch_norms, unwrap
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.modules._pool_statistics import pool_statistics

__all__ = ["reduce_buffers"]


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
    pool_statistics(layers, resolve(group_spec(process_group)))
    return len(layers)
