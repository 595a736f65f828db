"""Running statistics: one update per call, in tensor operations only, so that nothing is read back to the host.

The same update serves ``momentum=None`` (cumulative average), calls in which every rank was empty (nothing changes)
and ``accumulate`` (one update per several micro-batches).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm.core.moments import Moments, from_sums, merge_moments, to_sums

__all__ = ["RunningStatistics", "pool_running", "update_running"]


class RunningStatistics(NamedTuple):
    """The buffers of a layer and how they move.

    Attributes:
        mean: ``[C]`` or None.
        var: Unbiased variance, ``[C]`` or None.
        num_batches_tracked: int64 scalar or None.
        momentum: Weight of the new batch; None for the cumulative average.
        pending: float64 ``[2C + 2]``: sums over the micro-batches seen so far and, last, their number. None unless
            statistics are gathered over several micro-batches.
        accumulate: Micro-batches per update.
        tracked: Whether a batch moves them; False for statistics that are only looked at.
        skip_nonfinite: Whether a batch whose moments are not finite leaves them as they are.
    """

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    pending: Tensor | None = None
    accumulate: int = 1
    tracked: bool = True
    skip_nonfinite: bool = False


@torch.no_grad()
def update_running(running: RunningStatistics, batch: Moments) -> None:
    """Move the buffers towards the moments of one global batch, in place.

    ``running = (1 - f)·running + f·batch`` with f the momentum, or 1/num_batches_tracked for the cumulative average; the
    variance is the unbiased one over the global count. A batch without samples changes nothing, the counter included.

    Args:
        running: The buffers, changed in place.
        batch: Moments over all ranks, ``mean`` and ``m2`` [C].

    Reference: Ioffe & Szegedy (2015), section 3.1; Hoffer et al. (2017) for averages over several micro-batches.
    """
    if not running.tracked:
        return
    # A single value is refused too, by an error that torch.compile may order after this update.
    due: Tensor | bool = batch.count > 1
    if running.skip_nonfinite:
        finite = (batch.mean.isfinite() & batch.m2.isfinite()).all()
        due = due & finite
        # Zeros in place of NaN, which a factor of 0 would not stop.
        batch = Moments(batch.count * finite, *(torch.where(finite, part, 0.0) for part in (batch.mean, batch.m2)))
    if running.pending is not None:
        batch, due = _gather(running.pending, running.accumulate, batch)
    counter = running.num_batches_tracked
    if counter is not None:
        counter.add_(due)
    if running.mean is None or running.var is None:
        return
    factor: Tensor | float
    if running.momentum is None and counter is not None:
        factor = due / counter.clamp(min=1).double()
    else:  # as torch: without a counter there is no average to take
        factor = (due.double() if isinstance(due, Tensor) else due) * (running.momentum or 0.0)
    for buffer, new in ((running.mean, batch.mean), (running.var, batch.unbiased_var)):
        wide = buffer if buffer.dtype in (torch.float32, torch.float64) else buffer.float()
        weight = factor.to(wide.dtype) if isinstance(factor, Tensor) else factor
        moved = wide.lerp_(new.to(wide.dtype), weight)
        if wide is not buffer:
            buffer.copy_(moved)


def pool_running(mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics of several populations as those of their mixture: the law of total variance.

    Args:
        mean: float64 ``[R, C]``, one row for each population.
        var: float64 ``[R, C]``.
        weight: float64 ``[R]``; populations count equally where all are 0.

    Returns:
        Mean and variance ``[C]``; where all rows are equal, those very numbers.
    """
    weight = torch.where(weight.sum() > 0, weight, 1.0)
    pooled = merge_moments(Moments(weight, mean, weight.unsqueeze(-1) * var))
    alike = ((mean == mean[0]) & (var == var[0])).all(0)
    return torch.where(alike, mean[0], pooled.mean), torch.where(alike, var[0], pooled.m2 / weight.sum())


def _gather(pending: Tensor, accumulate: int, batch: Moments) -> tuple[Moments, Tensor]:
    """Add a micro-batch to ``pending``; the pooled moments so far, and whether they are due."""
    # The k-th micro-batch completes the sums; the one after it starts them again.
    started = pending[-1] % accumulate
    row = to_sums(batch)
    counted = row[0] > 1
    sums = torch.where(started > 0, pending[:-1], 0.0) + torch.where(counted, row, 0.0)
    pending.copy_(torch.cat([sums, (started + counted).reshape(1)]))
    return from_sums(sums), counted & (pending[-1] == accumulate)
