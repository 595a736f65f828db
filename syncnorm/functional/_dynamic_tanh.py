"""Dynamic tanh: what a trained layer norm looks like, without its statistics."""

import torch
from torch import Tensor

from syncnorm.functional._inputs import accumulate_dtype, over_dim
from syncnorm.functional._layer_norm import check_normalized

__all__ = ["dynamic_tanh"]


def dynamic_tanh(
    input: Tensor,
    alpha: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> Tensor:
    """``y = tanh(α · x) · γ + β``, element by element.

    Args:
        input: ``[*, D]``, or D at ``channel_dim``; any floating dtype, any layout.
        alpha: α, of one element.
        weight: γ, ``[D]`` or None.
        bias: β, ``[D]`` or None.
        channel_dim: Where D is, if not last.

    Returns:
        Tensor like ``input``, in its dtype and layout. Computed in at least float32.

    Raises:
        ValueError: If D does not fit, or α has several elements.
        TypeError: If the input is not floating point.

    Reference: Zhu, Chen, He, LeCun & Liu (2025).
    """
    if alpha.numel() != 1:
        raise ValueError(f"dynamic_tanh: expected alpha of one element, got {list(alpha.shape)}.")
    vector = weight if weight is not None else bias
    dim = input.size(channel_dim) if vector is None else vector.numel()
    check_normalized("dynamic_tanh", input, dim, channel_dim)
    y = torch.tanh(alpha.reshape(()) * input.to(accumulate_dtype(input.dtype)))
    y = y if weight is None else y * over_dim(weight, input, channel_dim)
    return (y if bias is None else y + over_dim(bias, input, channel_dim)).to(input.dtype)
