"""What is measured of a model's norms, as rows that merge exactly: over calls, steps and ranks.

A row holds one number for each channel, the channels of all layers side by side. The first three rows are Moments, merged by
Chan's formula; all further rows add up.
"""

# K rows, C channels of all layers together, R parts, L layers

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from syncnorm.core.moments import Moments, merge_moments

__all__ = [
    "Input",
    "between_share",
    "evaluation_gap",
    "merge_rows",
    "moments_of",
    "over_channels",
    "over_layers",
    "rows_of",
]


class Input(IntEnum):
    """The rows of what layers were given.

    A *part* is one call of a layer on one rank. Ranks that share a statistic have a part of it each.
    """

    COUNT = 0
    MEAN = 1
    M2 = 2
    WITHIN = 3  # M2 within parts
    PARTS = 4
    STATISTICS = 5
    WITHIN_SAMPLES = 6  # M2 within samples; 0 where each sample is one value
    SAMPLES = 7


def merge_rows(parts: Tensor) -> Tensor:
    """Rows of the union of disjoint sets of samples, float64 ``[K, C]``, from those of the sets, ``[R, K, C]``."""
    moments = merge_moments(Moments(parts[:, 0], parts[:, 1].unsqueeze(-1), parts[:, 2].unsqueeze(-1)))
    return torch.cat([rows_of(Moments(moments.count, *(m.squeeze(-1) for m in moments[1:]))), parts[:, 3:].sum(0)])


def rows_of(moments: Moments) -> Tensor:
    """Moments as rows ``[3, C]``."""
    count = torch.as_tensor(moments.count, dtype=torch.float64, device=moments.mean.device)
    return torch.stack([count.expand_as(moments.mean), moments.mean, moments.m2])


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance ``[C]``; NaN for a channel without samples."""
    count, mean, m2 = rows[:3].unbind(0)
    none = torch.where(count > 0, 0.0, torch.nan)
    return count, mean + none, m2 / count + none


def between_share(rows: Tensor, within: Input, sets: Input) -> Tensor:
    """Share of the total variance that lies between sets of samples, ``[C]``; NaN for a single set or no variance at all."""
    share = (rows[Input.M2] - rows[within]).clamp(min=0) / rows[Input.M2]
    return torch.where(rows[sets] > 1, share, torch.nan)


def evaluation_gap(inputs: Tensor, running: Tensor) -> Tensor:
    """How far a layer that is given this would be from itself in training if it evaluated, in standard deviations ``[C]``.

    The root mean square, over the samples, of (x - μ)/σ, what training gives, minus (x - m)/s, what evaluation gives:
    √((μ - m)² + Var x·(1 - s/σ)²)/s, with σ² the variance of the samples plus eps and s² the running one plus eps.

    Args:
        inputs: Moments of what the layer was given, ``[3, C]`` or more rows.
        running: ``[4, C]``: how many running statistics were added up, and the sums of their means, variances and eps.
    """
    _, mean, var = moments_of(inputs)
    m, v, eps = (running[1:4] / torch.where(running[0] > 0, running[0], torch.nan)).unbind(0)
    s = (v + eps).sqrt()
    return ((mean - m).square() + var * (1 - s / (var + eps).sqrt()).square()).sqrt() / s


def over_channels(values: Tensor, num_features: Sequence[int], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """One number for each layer, ``[L]``, from one for each channel; NaN stands for no number."""
    return torch.stack([_known(part, reduce) for part in values.split(list(num_features))])


def over_layers(values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """One number for the model; NaN stands for no number."""
    return _known(values, reduce)


def _known(values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    known = values[~values.isnan()]
    return reduce(known) if known.numel() else values.new_full((), torch.nan)
