"""Weight standardisation: the weights of each output filter get mean 0 and variance 1."""

import torch
from torch import Tensor

from syncnorm.functional._inputs import accumulate_dtype, check_floating

__all__ = ["weight_standardization"]


def weight_standardization(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardise a weight per output filter: ``Ŵ = (W - μ) / sqrt(σ² + eps)``, over all dims but the first.

    The variance is biased and eps is inside the root, as in the paper. The authors' code takes an unbiased standard
    deviation and adds 1e-5 outside, timm adds 1e-6 and BiT 1e-10 inside; for a norm that follows, these are one scale.

    Args:
        weight: ``[out, *]``, at least two dims and two values per filter, any floating dtype.
        eps: Added to the variance.

    Returns:
        Tensor like ``weight``, in its dtype. Statistics are at least float32.

    Raises:
        ValueError: If a filter has fewer than two values, which would all become 0.
        TypeError: If the weight is not floating point.

    Reference: Qiao, Wang, Liu, Shen & Yuille (2019), section 3.
    """
    check_floating("weight_standardization", weight)
    if weight.dim() < 2 or weight.shape[1:].numel() < 2:
        raise ValueError(
            f"weight_standardization: expected a weight [out, *] of at least 2 values per filter, got {list(weight.shape)}: "
            "standardised, a single value is 0. Leave such layers (depthwise 1×1, vectors) as they are."
        )
    rows = weight.flatten(1).to(accumulate_dtype(weight.dtype))
    # Layer norm of the rows is this very formula, in one fused operator.
    standardised = torch.layer_norm(rows, (rows.size(1),), None, None, eps)
    return standardised.reshape(weight.shape).to(weight.dtype)
