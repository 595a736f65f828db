"""Weight standardisation: the weights of each output filter get mean 0 and variance 1."""

import torch
from torch import Tensor

from syncnorm.functional._inputs import accumulate_dtype, check_floating

__all__ = ["filter_rows", "weight_standardization"]


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
    rows = filter_rows("weight_standardization", weight, "standardised")
    # Layer norm of the rows is this very formula, in one fused operator.
    standardised = torch.layer_norm(rows, (rows.size(1),), None, None, eps)
    return standardised.reshape(weight.shape).to(weight.dtype)


def filter_rows(method: str, weight: Tensor, done: str) -> Tensor:
    """The filters of ``weight`` [out, *] as rows, in at least float32; an error if there is one value in each.

    Args:
        method: Name of the public function, for messages.
        weight: ``[out, *]``.
        done: What has been done to a weight, for messages.
    """
    check_floating(method, weight)
    if weight.dim() < 2 or weight.shape[1:].numel() < 2:
        raise ValueError(
            f"{method}: expected a weight [out, *] of at least 2 values per filter, got {list(weight.shape)}: {done}, a "
            "single value is 0. Leave such layers (depthwise 1×1, vectors) as they are."
        )
    return weight.flatten(1).to(accumulate_dtype(weight.dtype))
