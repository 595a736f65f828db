"""What happens to the ``[C]`` vectors of a layer between its passes over the data, in one native operator each.

:mod:`syncnorm.core` says what these functions mean, and serves wherever the native operators do not: in a traced graph, on
an accelerator, before they are built. On a small feature map they count: a dozen of torch's operators, called while the
caches are full of data, cost as much as a pass over it (C = 1024, 7x7: 81 of 960 µs a step for what is now 34).
"""

# C channels

import torch
from torch import Tensor

from syncnorm.core import running as core_running
from syncnorm.core.moments import Moments
from syncnorm.core.running import RunningStatistics
from syncnorm.kernels import native

__all__ = ["inverse_std", "update_running"]


def inverse_std(moments: Moments, eps: float) -> Tensor:
    """``1 / √(var + eps)``, float64 ``[C]``."""
    if not _serves(moments.count, moments.m2):
        return moments.var.add_(eps).rsqrt_()
    rstd: Tensor = torch.ops.syncnorm.inverse_std.default(moments.m2, moments.count, eps)
    return rstd


def update_running(running: RunningStatistics, batch: Moments) -> None:
    """:func:`syncnorm.core.running.update_running`."""
    mean, var, counter = running.mean, running.var, running.num_batches_tracked
    if (
        mean is None
        or var is None
        or running.pending is not None
        or running.skip_nonfinite
        or not running.tracked
        or (counter is not None and counter.dtype != torch.int64)
        or not _serves(batch.count, batch.mean, batch.m2, mean, var, *(() if counter is None else (counter,)))
    ):
        core_running.update_running(running, batch)
    elif batch.count > 1:
        torch.ops.syncnorm.update_running.default(*batch[1:], batch.count, mean, var, counter, running.momentum)


def _serves(count: Tensor | float | None, *tensors: Tensor) -> bool:
    if not isinstance(count, float) or torch.compiler.is_compiling() or native.load() is not None:
        return False
    return all([type(t) is Tensor and t.is_cpu for t in tensors])  # noqa: C419 (a generator costs twice as much)
