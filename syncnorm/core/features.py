"""Moments of feature vectors, in the form in which a feature that never varies has a variance of exactly 0."""

# N samples, F features

from torch import Tensor

from syncnorm.core.moments import Moments, at_least_one, empty_moments

__all__ = ["add_moments", "feature_moments"]


def feature_moments(x: Tensor) -> Moments:
    """Moments of the rows of ``x``, float64 ``[N, F]``; N may be 0.

    Deviations are taken from the first row before anything is averaged: those of a constant feature are exactly 0, where
    the rounding of its mean would leave a variance of 1e-34 to divide by.
    """
    if x.size(0) == 0:
        return empty_moments(x.size(1), x.device)
    origin = x[0]
    centred = x - origin
    shift = centred.mean(0)
    return Moments(float(x.size(0)), origin + shift, (centred - shift).square().sum(0))


def add_moments(old: Moments, new: Moments) -> Moments:
    """Moments of the union of two disjoint sample sets.

    :func:`syncnorm.core.moments.merge_moments` for two parts, with what it does not promise: an empty part changes no bit
    of the other one, and equal means stay the mean they are.

    Reference: Chan, Golub & LeVeque (1979), pairwise updating.
    """
    count = old.count + new.count
    share = new.count / at_least_one(count)
    delta = new.mean - old.mean
    return Moments(count, old.mean + delta * share, old.m2 + new.m2 + delta.square() * (old.count * share))
