"""The affine map of a norm, given per sample: what conditional batch norm, FiLM and AdaIN from a condition share."""

# N batch, C channels

import torch
from torch import Tensor

from syncnorm.core.layout import accumulate_dtype

__all__ = ["conditional_affine"]


def conditional_affine(input: Tensor, scale: Tensor, shift: Tensor, channel_dim: int = 1) -> Tensor:
    """Scale and shift the channels of each sample by numbers of its own: ``y = x·(1 + scale) + shift``.

    Args:
        input: ``[N, *, C, *]``, any floating dtype; usually normalised.
        scale: Δγ, ``[N, C]``. Zeros leave the input as it is.
        shift: β, ``[N, C]``.
        channel_dim: Where the channels are; not 0.

    Returns:
        Tensor like ``input``, in its dtype; computed in at least float32.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> conditional_affine(torch.ones(1, 2, 3), torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 0.0]]))
        tensor([[[6., 6., 6.],
                 [2., 2., 2.]]])

    Reference: Perez et al. (2018), arXiv:1709.07871, equation 2, with γ predicted as 1 + Δγ (section 7.2); de Vries et al.
    (2017), arXiv:1707.00683, section 3.2.
    """
    if not -input.dim() < channel_dim < input.dim() or channel_dim == 0:
        raise ValueError(
            f"conditional_affine: channel_dim must be a dim behind the batch's, got {channel_dim} for an input "
            f"{list(input.shape)}."
        )
    wanted = (input.size(0), input.size(channel_dim))
    for name, value in (("scale", scale), ("shift", shift)):
        if value.shape != wanted:
            raise ValueError(
                f"conditional_affine: {name} must be [N, C] = {list(wanted)} for an input {list(input.shape)} with channels "
                f"in dim {channel_dim}, got {list(value.shape)}."
            )
    wide = [1] * input.dim()
    wide[0], wide[channel_dim] = wanted
    dtype = torch.promote_types(accumulate_dtype(input.dtype), scale.dtype)
    scale, shift = (vector.to(dtype).reshape(wide) for vector in (scale, shift))
    return (input.to(dtype) * (1 + scale) + shift).to(input.dtype)
