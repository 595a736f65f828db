"""Layer norm over the last dims, or over the channels of an input that has them elsewhere."""

# D normalised features

from collections.abc import Sequence

import torch
from torch import Tensor

from syncnorm.functional._inputs import accumulate_dtype, check_floating, same_dtype, with_layout_of

__all__ = ["check_normalized", "layer_norm", "normalized_shape"]


def layer_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = -1,
) -> Tensor:
    """Normalise over the features of each sample or position: ``y = (x - μ) / sqrt(σ² + eps) · γ + β``.

    With ``channel_dim=1`` on ``[N, C, H, W]`` each position is normalised over its channels (positional norm, the
    ``LayerNorm2d`` of ConvNeXt). Over channels *and* space it is :func:`group_norm` with one group.

    Args:
        input: ``[*, D]``, or D at ``channel_dim``; any floating dtype, any layout; other dims may be 0.
        dim: D, or the sizes of the last dims, which are then normalised together.
        weight: γ, of shape ``dim``, or None.
        bias: β, of shape ``dim``, or None.
        eps: Added to the (biased) variance.
        channel_dim: Where D is, if not last. Only with a single D.

    Returns:
        Tensor like ``input``, in its dtype and layout. Statistics are at least float32. A single feature gives β.

    Raises:
        ValueError: If the input has other sizes than ``dim`` there.
        TypeError: If the input is not floating point.

    Reference: Ba, Kiros & Hinton (2016), equation 3.
    """
    shape = check_normalized("layer_norm", input, dim, channel_dim)
    moved = channel_dim % input.dim() != input.dim() - 1 and len(shape) == 1
    x = input.movedim(channel_dim, -1) if moved else input
    if not same_dtype(input, weight, bias):
        x = x.to(accumulate_dtype(input.dtype))
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    y = torch.layer_norm(x, shape, weight, bias, eps).to(input.dtype)
    return with_layout_of(input, y.movedim(-1, channel_dim)) if moved else y


def normalized_shape(dim: int | Sequence[int]) -> tuple[int, ...]:
    """``dim`` as a shape."""
    return (int(dim),) if isinstance(dim, int) else tuple(dim)


def check_normalized(name: str, input: Tensor, dim: int | Sequence[int], channel_dim: int) -> tuple[int, ...]:
    """The shape that is normalised together; raise unless ``input`` is floating point and has it."""
    shape = normalized_shape(dim)
    if channel_dim != -1 and len(shape) != 1:
        raise ValueError(f"{name}: channel_dim={channel_dim} goes with one number of features, got dim={list(shape)}.")
    check_floating(name, input)
    if not -input.dim() <= channel_dim < input.dim():
        raise ValueError(f"{name}: expected an input with a dim {channel_dim}, got {list(input.shape)}.")
    found = input.shape[-len(shape) :] if channel_dim == -1 else (input.size(channel_dim),)
    if tuple(found) != shape:
        where = f"in dim {channel_dim}" if len(shape) == 1 else "in the last dims"
        hint = ""
        if channel_dim == -1 and len(shape) == 1 and input.dim() > 1 and input.size(1) == shape[0]:
            hint = " The features seem to be in dim 1: use channel_dim=1."
        elif channel_dim != -1 and input.size(-1) == shape[0]:
            hint = " The features seem to be last: leave out channel_dim."
        sizes = shape[0] if len(shape) == 1 else list(shape)
        raise ValueError(f"{name}: expected {sizes} features {where}, got an input {list(input.shape)}.{hint}")
    return shape
