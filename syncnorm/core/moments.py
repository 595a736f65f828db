"""Moments (count, mean, M2) of a set of samples, and how two sets become one.

Everything that uses batch statistics is a merge of Moments: over ranks, over ghost chunks, over time. They are always
float64: a count stays exact to 2^53, and a merge loses less than float32 data can tell.
"""

# C channels, R parts to merge

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "empty_moments", "from_sums", "merge_moments", "stack_moments", "to_sums"]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a set of samples, per channel.

    Attributes:
        count: Samples per channel, float64 ``[...]``.
        mean: float64 ``[..., C]``; 0 where the count is 0.
        m2: Sum of squared deviations from ``mean``, float64 ``[..., C]``.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance ``[..., C]``, ``m2 / count``; 0 where the count is 0."""
        return self.m2 / self.count.clamp(min=1).unsqueeze(-1)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance ``[..., C]``, ``m2 / (count - 1)``, as running statistics keep it."""
        return self.m2 / (self.count - 1).clamp(min=1).unsqueeze(-1)


def empty_moments(num_features: int, device: torch.device) -> Moments:
    """Moments of no samples: the neutral element of :func:`merge_moments`."""
    zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
    return Moments(torch.zeros((), dtype=torch.float64, device=device), zeros, zeros.clone())


def stack_moments(parts: list[Moments]) -> Moments:
    """Stack Moments of equal shape along a new leading dim."""
    return Moments(*(torch.stack(field) for field in zip(*parts, strict=True)))


def merge_moments(parts: Moments) -> Moments:
    """Combine the moments of disjoint sample sets into those of their union.

    Args:
        parts: Moments with a leading dim to merge over; ``count`` [R], ``mean`` and ``m2`` [R, C].
            A part with count 0 adds nothing.

    Returns:
        Moments without that dim. Equal, up to rounding, to the moments of all samples at once.

    Example:
        >>> low = Moments(torch.tensor(1.0), torch.tensor([0.0]), torch.tensor([0.0]))
        >>> high = Moments(torch.tensor(1.0), torch.tensor([1.0]), torch.tensor([0.0]))
        >>> merge_moments(stack_moments([low, high])).mean
        tensor([0.5000])

    Reference: Chan, Golub & LeVeque (1979), pairwise updating, here in its k-way form.
    """
    count_R1 = parts.count.unsqueeze(-1)
    count = parts.count.sum(0)
    mean = (count_R1 * parts.mean).sum(0) / count.clamp(min=1)
    m2 = (parts.m2 + count_R1 * (parts.mean - mean).square()).sum(0)
    return Moments(count, mean, m2)


def to_sums(moments: Moments) -> Tensor:
    """The row that adds up over ranks: ``[count, n·μ, M2 + n·μ²]``, float64 ``[2C + 1]``.

    The sums of squares are formed from a mean and an M2 that were computed stably first, and in float64: what is lost
    in the variance is about 1e-16·(mean/std)². Sums of x² in float32 would be 20 % off at mean/std = 1e3.
    """
    total = moments.count * moments.mean
    return torch.cat([moments.count.reshape(1), total, moments.m2 + total * moments.mean])


def from_sums(row: Tensor) -> Moments:
    """Moments from an added-up row of :func:`to_sums`, float64 ``[2C + 1]``. The variance is never negative."""
    count = row[0]
    total, squares = row[1:].view(2, -1).unbind(0)
    mean = total / count.clamp(min=1)
    return Moments(count, mean, (squares - total * mean).clamp(min=0))
