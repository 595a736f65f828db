"""Averages over the last batches, kept as a window that moves by one batch at a time.

Tensor operations only, so that nothing is read back to the host. A window is float64 ``[m, C + 1]``: a row per batch, the
latest last, and behind its values a 1; rows that no batch has filled yet are 0 and count for nothing.
"""

# C channels

from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm.core.traced import not_recomputed

__all__ = ["MovingAverages", "average", "empty_window", "keep", "moved", "renorm_scales"]


class MovingAverages(NamedTuple):
    """What moving average batch normalisation keeps beside the running statistics.

    Attributes:
        squares: Window of χ², the mean square of the input.
        slopes: Window of ψ, the mean product of normalised input and gradient.
        warmup: Batches during which the output is not pulled towards evaluation.
        r_max: Largest factor by which it is pulled afterwards.
    """

    squares: Tensor
    slopes: Tensor
    warmup: int
    r_max: float


def empty_window(size: int, num_features: int, device: torch.device | None = None) -> Tensor:
    """A window that no batch has been in."""
    return torch.zeros(size, num_features + 1, dtype=torch.float64, device=device)


def moved(window: Tensor, row: Tensor) -> Tensor:
    """The window one batch later: without its oldest row, and with ``row`` [C] at its end. A new tensor."""
    return torch.cat([window[1:], torch.cat([row, row.new_ones(1)]).unsqueeze(0)])


def average(window: Tensor) -> Tensor:
    """Mean of the rows that are filled, ``[C]``; there must be one."""
    sums = window.sum(0)
    return sums[:-1] / sums[-1]


def keep(window: Tensor, later: Tensor, count: Tensor | float) -> None:
    """Make ``window`` what :func:`moved` gave, in place; unless its last batch had no samples.

    Nor is a row kept that is not finite: the gradients of a step that a loss scaler is about to skip would stay for as long
    as the window is, and make the next steps overflow, too.
    """
    due = later[-1].isfinite().all() & (count > 0)
    window.copy_(torch.where(due, later, window))


@torch.no_grad()
def renorm_scales(
    square: Tensor, running: Tensor, eps: float, num_batches_tracked: Tensor | None, averages: MovingAverages
) -> tuple[Tensor, Tensor]:
    """1/√(χ̄² + ε), and the factor r that takes what it normalises to what evaluation gives; constants to the gradient.

        r = clip(√(χ̄² + ε) / √(running + ε), 1/r_max, r_max),   1 in the first ``warmup`` batches

    Args:
        square: χ̄², the mean square over the last batches, float64 ``[C]``.
        running: The running mean square before this batch, ``[C]``.
        eps: ε.
        num_batches_tracked: Batches so far, int64 scalar; None if nobody counts, which ends the warm-up.
        averages: r_max and the length of the warm-up.

    Returns:
        Two float64 ``[C]``.
    """
    wanted = ((square + eps) / (running.double() + eps)).sqrt()
    r = wanted.clamp(1 / averages.r_max, averages.r_max)
    if num_batches_tracked is not None:
        r = torch.where(num_batches_tracked < averages.warmup, 1.0, r)
    rstd, r = not_recomputed(torch.stack([(square + eps).rsqrt(), r])).unbind(0)
    return rstd, r
