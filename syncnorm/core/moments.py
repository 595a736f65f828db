"""Moments (count, mean, M2) of a set of samples, and how two sets become one.

Everything that uses batch statistics is a merge of Moments: over ranks, over ghost chunks, over time. They are always
float64: a count stays exact to 2^53, and a merge loses less than float32 data can tell.
"""

# C channels, R parts to merge

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "at_least_one", "empty_moments", "from_sums", "merge_moments", "stack_moments", "to_sums"]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a set of samples, per channel.

    Attributes:
        count: Samples per channel: a float where the host knows it, which a rank's own count always is, else a float64
            tensor ``[...]``, which the host need not wait for.
        mean: float64 ``[..., C]``; 0 where the count is 0.
        m2: Sum of squared deviations from ``mean``, float64 ``[..., C]``.
    """

    count: Tensor | float  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance ``[..., C]``, ``m2 / count``; 0 where the count is 0."""
        return self.m2 / _divisor(self.count)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance ``[..., C]``, ``m2 / (count - 1)``, as running statistics keep it."""
        return self.m2 / _divisor(self.count - 1)


def empty_moments(num_features: int, device: torch.device) -> Moments:
    """Moments of no samples: the neutral element of :func:`merge_moments`."""
    mean, m2 = torch.zeros(2, num_features, dtype=torch.float64, device=device).unbind(0)
    return Moments(0.0, mean, m2)


def stack_moments(parts: list[Moments]) -> Moments:
    """Stack Moments of equal shape along a new leading dim."""
    means = torch.stack([part.mean for part in parts])
    # A number is written by a fill: a copy to an accelerator would make the host wait.
    counts = [part.count if isinstance(part.count, Tensor) else means.new_full((), part.count) for part in parts]
    return Moments(torch.stack(counts), means, torch.stack([part.m2 for part in parts]))


def merge_moments(parts: Moments) -> Moments:
    """Combine the moments of disjoint sample sets into those of their union.

    Args:
        parts: Moments with a leading dim to merge over; ``count`` [R], ``mean`` and ``m2`` [R, C].
            A part with count 0 adds nothing.

    Returns:
        Moments without that dim. Equal, up to rounding, to the moments of all samples at once.

    Example:
        >>> low = Moments(1.0, torch.tensor([0.0]), torch.tensor([0.0]))
        >>> high = Moments(1.0, torch.tensor([1.0]), torch.tensor([0.0]))
        >>> merge_moments(stack_moments([low, high])).mean
        tensor([0.5000])

    Reference: Chan, Golub & LeVeque (1979), pairwise updating, here in its k-way form.
    """
    assert isinstance(parts.count, Tensor)
    count_R1 = parts.count.unsqueeze(-1)
    count = parts.count.sum(0)
    mean = (count_R1 * parts.mean).sum(0) / _divisor(count)
    m2 = (parts.m2 + count_R1 * (parts.mean - mean).square()).sum(0)
    return Moments(count, mean, m2)


def to_sums(moments: Moments) -> Tensor:
    """The row that adds up over ranks: ``[count, n·μ, M2 + n·μ²]``, float64 ``[2C + 1]``.

    The sums of squares are formed from a mean and an M2 that were computed stably first, and in float64: what is lost
    in the variance is about 1e-16·(mean/std)². Sums of x² in float32 would be 20 % off at mean/std = 1e3.
    """
    total = moments.mean * moments.count
    count = moments.count
    word = count.reshape(1) if isinstance(count, Tensor) else total.new_full((1,), count)
    return torch.cat([word, total, torch.addcmul(moments.m2, total, moments.mean)])


def from_sums(row: Tensor, count: float | None = None) -> Moments:
    """Moments from an added-up row of :func:`to_sums`. The variance is never negative.

    Args:
        row: float64 ``[2C + 1]``.
        count: Its first word, where the host has read it.
    """
    known = row[0] if count is None else count
    total, squares = row[1:].view(2, -1).unbind(0)
    mean = total / _divisor(known)
    return Moments(known, mean, torch.addcmul(squares, total, mean, value=-1).clamp_(min=0))


def at_least_one(count: Tensor | float) -> Tensor | float:
    """The count, or 1 where it is 0: what a sum over no samples may be divided by."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)


def _divisor(count: Tensor | float) -> Tensor | float:
    safe = at_least_one(count)
    return safe.unsqueeze(-1) if isinstance(safe, Tensor) else safe
