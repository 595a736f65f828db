"""What is measured of a model's norms, as rows that merge exactly: over calls, steps and ranks.

A row holds one number for each channel, the channels of all layers side by side. The first three rows are Moments, merged by
Chan's formula; all further rows add up.
"""

# K rows, C channels of all layers together, R parts, L layers

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from syncnorm.core.moments import Moments, merge_moments

__all__ = [
    "Array",
    "Input",
    "between_share",
    "evaluation_gap",
    "merge_rows",
    "moments_of",
    "over_channels",
    "over_layers",
]


Array: TypeAlias = NDArray[np.float64]


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
    merged = merge_moments(Moments(parts[:, 0], parts[:, 1].unsqueeze(-1), parts[:, 2].unsqueeze(-1)))
    sums = parts.sum(0)
    return torch.cat([sums[:1], merged.mean.T, merged.m2.T, sums[3:]])


# What follows is computed on the host, once in many steps: numpy takes a third of the time of torch for short vectors.


def moments_of(rows: Array) -> tuple[Array, Array]:
    """Mean and biased variance ``[C]``; NaN for a channel without samples."""
    count = np.where(rows[0] > 0, rows[0], np.nan)
    return rows[1] + 0 * count, rows[2] / count


def between_share(rows: Array, within: Input, sets: Input, num_means: int | Array = 1) -> Array:
    """Share of the total variance that lies between sets of samples, ``[C]``; NaN for a single set or no variance at all.

    Args:
        rows: In the order of :class:`Input`, ``[8, C]``.
        within: The row with M2 within the sets.
        sets: The row with their number.
        num_means: About how many means M2 is: 1, or that of kinds of sets of which each has a mean of its own.
    """
    total = np.where((rows[sets] > num_means) & (rows[Input.M2] > 0), rows[Input.M2], np.nan)
    return np.maximum(rows[Input.M2] - rows[within], 0) / total  # type: ignore[no-any-return]


def evaluation_gap(inputs: Array, running: Array) -> Array:
    """How far a layer that is given this would be from itself in training if it evaluated, in standard deviations ``[C]``.

    The root mean square, over the samples, of (x - μ)/σ, what training gives, minus (x - m)/s, what evaluation gives:
    √((μ - m)² + Var x·(1 - s/σ)²)/s, with σ² the variance of the samples plus eps and s² the running one plus eps.

    Args:
        inputs: Moments of what the layer was given, ``[3, C]`` or more rows.
        running: ``[4, C]``: how many running statistics were added up, and the sums of their means, variances and eps.
    """
    mean, var = moments_of(inputs)
    m, v, eps = running[1:4] / np.where(running[0] > 0, running[0], np.nan)
    s = np.sqrt(v + eps)
    return np.sqrt((mean - m) ** 2 + var * (1 - s / np.sqrt(var + eps)) ** 2) / s  # type: ignore[no-any-return]


def over_channels(values: Array, num_features: Sequence[int]) -> tuple[Array, Array]:
    """Mean and largest of the channels of each layer, ``[L]``, from ``[C]``; NaN stands for no number."""
    starts = np.cumsum([0, *num_features[:-1]])
    known = ~np.isnan(values)
    count = np.add.reduceat(known, starts, dtype=np.float64)
    means = np.add.reduceat(np.where(known, values, 0), starts) / np.where(count > 0, count, np.nan)
    return means, np.fmax.reduceat(values, starts)


def over_layers(values: list[float], reduce: Callable[[list[float]], float]) -> float:
    """One number for the model, from one for each layer; NaN stands for no number."""
    known = [value for value in values if not math.isnan(value)]
    return reduce(known) if known else math.nan
