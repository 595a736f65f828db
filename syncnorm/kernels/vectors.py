"""What happens to the ``[C]`` vectors of a layer between its passes over the data, in one native operator each, or one kernel.

:mod:`syncnorm.core` says what these functions mean, and serves wherever others do not: in a traced graph, before the native
operators are built, without Triton. On a small feature map they count: a dozen of torch's operators, called while the
caches are full of data, cost as much as a pass over it (C = 1024, 7x7: 81 of 960 µs a step for what is now 34).
"""

# C channels

import torch
from torch import Tensor

from syncnorm.core import running as core_running
from syncnorm.core.moments import Moments
from syncnorm.core.running import RunningStatistics
from syncnorm.kernels import native, triton

__all__ = ["inverse_std", "update_running"]


def inverse_std(moments: Moments, eps: float) -> Tensor:
    """``1 / √(var + eps)``, float64 ``[C]``."""
    if not _serves(moments.count, moments.m2):
        return moments.var.add_(eps).rsqrt_()
    rstd: Tensor = torch.ops.syncnorm.inverse_std.default(moments.m2, moments.count, eps)
    return rstd


def update_running(running: RunningStatistics, batch: Moments, backend: str = "auto") -> None:
    """:func:`syncnorm.core.running.update_running`. ``backend`` names the one of the layer, or is ``"auto"``."""
    mean, var, counter = running.mean, running.var, running.num_batches_tracked
    if (
        mean is None
        or var is None
        or running.pending is not None
        or running.skip_nonfinite
        or not running.tracked
        or (counter is not None and counter.dtype != torch.int64)
    ):
        core_running.update_running(running, batch)
        return
    buffers = (mean, var) if counter is None else (mean, var, counter)
    if _serves(batch.count, *batch[1:], *buffers):
        if batch.count > 1:
            torch.ops.syncnorm.update_running.default(*batch[1:], batch.count, mean, var, counter, running.momentum)
    elif backend in ("auto", "triton") and _triton_serves(batch, *buffers):
        triton.move_running(batch, mean, var, counter, running.momentum)
    else:
        core_running.update_running(running, batch)


def _serves(count: Tensor | float | None, *tensors: Tensor) -> bool:
    if not isinstance(count, float) or torch.compiler.is_compiling() or native.load() is not None:
        return False
    return all([type(t) is Tensor and t.is_cpu for t in tensors])  # noqa: C419 (a generator costs twice as much)


def _triton_serves(batch: Moments, *buffers: Tensor) -> bool:
    """Whether everything is memory without gaps, on one accelerator, of widths that agree."""
    mean, width = batch.mean, buffers[0].numel()
    if triton.stands_back(mean) or triton.objection(mean) is not None or mean.dim() != 1:
        return False
    tensors = (mean, batch.m2, *buffers, *((batch.count,) if isinstance(batch.count, Tensor) else ()))
    return all(triton.serves_whole(t) and t.device == mean.device and t.is_contiguous() for t in tensors) and (
        width == mean.numel() == buffers[1].numel()
    )
