"""EvoNorm-S0: a normalisation and an activation that were searched for together, on single samples."""

# N batch, C channels, G groups

import torch
from torch import Tensor

from syncnorm.functional._group_norm import check_groups
from syncnorm.functional._inputs import check_channels, over_dim
from syncnorm.functional._samples import instance_moments, normalize_samples

__all__ = ["evo_norm_s0"]


def evo_norm_s0(
    input: Tensor,
    num_groups: int,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``y = x · sigmoid(v · x) / sqrt(σ² + eps) · γ + β``, with σ² over groups of adjacent channels and over space.

    The activation is part of it. σ² is biased; x itself is not centred, so a group of one value, whose variance is 0, is
    multiplied by 1 / sqrt(eps).

    Args:
        input: ``[N, C, *]``, any floating dtype, any layout; N may be 0.
        num_groups: G, a divisor of C.
        v: Slope of the gate, ``[C]``.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        eps: Added to the variance.

    Returns:
        Tensor like ``input``, in its dtype and layout. Computed in at least float32.

    Raises:
        ValueError: If C does not fit ``v``, or G does not divide C.
        TypeError: If the input is not floating point.

    Reference: Liu, Brock, Simonyan & Le (2020), EvoNorm-S0.
    """
    check_channels("evo_norm_s0", input, v.numel())
    check_groups("evo_norm_s0", input.size(1), num_groups)
    mean, var = (t.unflatten(1, (num_groups, -1)) for t in instance_moments(input))
    var = (var + (mean - mean.mean(2, keepdim=True)).square()).mean(2, keepdim=True)
    scale = torch.rsqrt(var + eps).expand_as(mean).flatten(1)
    x = input.to(scale.dtype)
    gated = x * torch.sigmoid(over_dim(v, x, 1) * x)
    return normalize_samples(gated, None, scale if weight is None else scale * weight, bias).to(input.dtype)
