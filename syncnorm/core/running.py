"""Running statistics: one update per call, in tensor operations only, so that nothing is read back to the host.

The same update serves ``momentum=None`` (cumulative average), calls in which every rank was empty (nothing changes)
and ``accumulate`` (one update per several micro-batches).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm.core.moments import Moments, from_sums, to_sums

__all__ = ["RunningStatistics", "update_running"]


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
    """

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    pending: Tensor | None = None
    accumulate: int = 1


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
    due = batch.count > 0
    if running.pending is not None:
        # The k-th micro-batch completes the sums; the one after it starts them again.
        started = running.pending[-1] % running.accumulate
        sums = torch.where(started > 0, running.pending[:-1], 0.0) + to_sums(batch)
        running.pending.copy_(torch.cat([sums, (started + due).reshape(1)]))
        due = due & (running.pending[-1] == running.accumulate)
        batch = from_sums(sums)
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(due)
    if running.mean is None or running.var is None:
        return
    if running.momentum is not None:
        factor = due.double() * running.momentum
    elif running.num_batches_tracked is not None:
        factor = due.double() / running.num_batches_tracked.clamp(min=1)
    else:
        factor = due.double() * 0.0  # as torch: without a counter there is no average to take
    running.mean.copy_(running.mean.double().lerp(batch.mean, factor))
    running.var.copy_(running.var.double().lerp(batch.unbiased_var, factor))
