"""Filter response norm, and the thresholded linear unit that follows it."""

# N batch, C channels

import torch
from torch import Tensor

from syncnorm.functional._inputs import check_channels, over_dim
from syncnorm.functional._samples import instance_moments, normalize_samples

__all__ = ["filter_response_norm", "thresholded_linear_unit"]


def filter_response_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    learned_eps: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Divide each channel of each sample by its root mean square over space: ``y = x / sqrt(ν² + ε) · γ + β``.

    Without spatial extent ν² is x² and the division leaves little but a sign, which is what ε is learned for.

    Args:
        input: ``[N, C, *]``, any floating dtype, any layout; N may be 0.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        eps: ε, or its constant part.
        learned_eps: ε_l, a scalar or ``[C]``, or None. Then ε = eps + abs(ε_l).
        threshold: τ, ``[C]``, for :func:`thresholded_linear_unit` of the result, before it is rounded; or None.

    Returns:
        Tensor like ``input``, in its dtype and layout. Squares are taken in at least float32: 300² is beyond float16.

    Raises:
        ValueError: If C does not fit the vectors.
        TypeError: If the input is not floating point.

    Reference: Singh & Krishnan (2020), section 3.
    """
    vector = weight if weight is not None else bias
    check_channels("filter_response_norm", input, None if vector is None else vector.numel())
    mean, var = instance_moments(input)
    nu2 = var + mean.square()
    scale = torch.rsqrt(nu2 + (eps if learned_eps is None else eps + learned_eps.to(nu2.dtype).abs()))
    x = input if threshold is None else input.to(nu2.dtype)  # rounded to τ, y would have half of the gradient
    y = normalize_samples(x, None, scale if weight is None else scale * weight, bias)
    return y if threshold is None else thresholded_linear_unit(y, threshold).to(input.dtype)


def thresholded_linear_unit(input: Tensor, threshold: Tensor) -> Tensor:
    """A ReLU with a learned threshold: ``z = max(y, τ)``. Where y = τ each gets half of the gradient.

    Args:
        input: y, ``[N, C, *]``.
        threshold: τ, ``[C]``.

    Returns:
        Tensor like ``input``, in its dtype and layout.

    Raises:
        ValueError: If C does not fit.
        TypeError: If the input is not floating point.

    Reference: Singh & Krishnan (2020), section 3.
    """
    check_channels("thresholded_linear_unit", input, threshold.numel())
    return torch.maximum(input, over_dim(threshold.to(input.dtype), input, 1))
