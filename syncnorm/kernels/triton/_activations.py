# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Activations and their derivatives inside a kernel.

Forward and backward form the pre-activation by the same function, so that the mask which the backward recomputes is the
one of the forward, bit for bit.
"""

import triton
import triton.language as tl

__all__ = ["CODES", "activate", "affine", "through"]

# Numbers, because Inductor generates code from the arguments of a kernel.
CODES = {"": 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_HALF_INV_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def affine(v, mean, scale, shift):
    """``(v - mean)·scale + shift`` with two roundings, spelled out so that no compiler chooses others."""
    centred = v - mean
    return tl.fma(centred, tl.broadcast_to(scale, centred.shape), tl.broadcast_to(shift, centred.shape))


@triton.jit
def activate(pre, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(pre). NaN stays NaN."""
    if ACTIVATION == 1:
        return tl.where(pre <= 0, 0.0, pre)
    elif ACTIVATION == 2:
        return tl.where(pre <= 0, pre * SLOPE, pre)
    elif ACTIVATION == 3:
        return pre / (1 + tl.exp(-pre))
    elif ACTIVATION == 4:
        return 0.5 * pre * (1 + tl.erf(pre * _SQRT_HALF))
    else:
        return pre


@triton.jit
def through(g, pre, positive, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """g·act'(pre); ``positive`` is ``pre > 0``, which is all that the first two need."""
    if ACTIVATION == 1:
        return tl.where(positive, g, 0.0)
    elif ACTIVATION == 2:
        return tl.where(positive, g, g * SLOPE)
    elif ACTIVATION == 3:
        sigmoid = 1 / (1 + tl.exp(-pre))
        return g * sigmoid * (1 + pre * (1 - sigmoid))
    elif ACTIVATION == 4:
        cdf = 0.5 * (1 + tl.erf(pre * _SQRT_HALF))
        return g * (cdf + pre * _SQRT_HALF_INV_PI * tl.exp(-0.5 * pre * pre))
    else:
        return g
