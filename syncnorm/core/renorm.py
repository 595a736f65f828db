"""The correction of batch renormalisation: how far the batch's statistics are from the running ones, clipped."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm.core.layout import accumulate_dtype
from syncnorm.core.moments import Moments
from syncnorm.core.traced import not_recomputed

__all__ = ["RenormLimits", "correct_affine", "renorm_correction"]


class RenormLimits(NamedTuple):
    """How far the correction may go, and where to note how often it wanted to go further.

    Attributes:
        limits: r_max and d_max, float64 ``[2]``: a tensor, so that a schedule can move them under ``torch.compile``.
        clip_rate: Written in place: the shares of channels whose r and d were clipped, float64 ``[2]``; or None.
    """

    limits: Tensor
    clip_rate: Tensor | None = None


@torch.no_grad()
def renorm_correction(
    batch: Moments, rstd: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, limits: RenormLimits
) -> tuple[Tensor, Tensor]:
    """The factors r and d of batch renormalisation, constants to the gradient.

        r = clip(σ_B / σ, 1/r_max, r_max),   d = clip((μ_B - μ) / σ, -d_max, d_max)

    with σ_B = √(σ²_B + ε) and σ = √(running_var + ε). Unclipped, (x - μ_B)/σ_B·r + d is (x - μ)/σ: what evaluation
    computes with the running statistics before this batch.

    Args:
        batch: Moments of the whole batch, ``mean`` [C].
        rstd: 1/σ_B, float64 ``[C]``.
        running_mean: μ, ``[C]``.
        running_var: ``[C]``.
        eps: ε.
        limits: r_max, d_max.

    Returns:
        r and d, float64 ``[C]``.

    Reference: Ioffe (2017), arXiv:1702.03275, algorithm 1.
    """
    r_max, d_max = limits.limits.unbind(0)
    running_rstd = (running_var.double() + eps).rsqrt()
    r_free, d_free = running_rstd / rstd, (batch.mean - running_mean.double()) * running_rstd
    r, d = r_free.clamp(1 / r_max, r_max), d_free.clamp(-d_max, d_max)
    if limits.clip_rate is not None:
        rates = torch.stack([(r != r_free).double().mean(), (d != d_free).double().mean()])
        limits.clip_rate.copy_(rates * (batch.count > 0))  # a batch without samples clips nothing
    r, d = not_recomputed(torch.stack([r, d])).unbind(0)
    return r, d


def correct_affine(
    weight: Tensor | None, bias: Tensor | None, correction: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """γ·r and β + γ·d, the affine parameters with which γ(x̂·r + d) + β is an ordinary affine map of x̂."""
    wide = accumulate_dtype(dtype)
    r, d = (part.to(wide) for part in correction)
    if weight is None:
        return r, d if bias is None else d + bias
    return weight * r, weight * d if bias is None else weight * d + bias
