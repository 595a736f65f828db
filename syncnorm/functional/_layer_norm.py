"""Layer norm over the last dims, or over the channels of an input that has them elsewhere."""

# D normalised features

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from syncnorm.functional._fused import check_residual
from syncnorm.functional._inputs import check_floating
from syncnorm.functional._rows import row_norm

__all__ = ["check_normalized", "layer_norm", "normalize_rows", "normalized_shape"]


@overload
def layer_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = -1,
    residual: None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def layer_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = -1,
    residual: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = -1,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
        residual: Added to ``input`` first, in its dtype: of its shape, dtype and device.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Returns:
        Tensor like ``input``, in its dtype and layout; with a residual a pair, the norm of the sum and the sum, which
        goes on past the layer. Statistics are at least float32. A single feature gives β.

    Raises:
        ValueError: If the input has other sizes than ``dim`` there, or the residual is not like the input.
        TypeError: If the input is not floating point.

    Reference: Ba, Kiros & Hinton (2016), equation 3.
    """
    shape = check_normalized("layer_norm", input, dim, channel_dim, residual)
    return normalize_rows(input, shape, channel_dim, weight, bias, eps, centre=True, residual=residual, backend=backend)


def normalize_rows(
    input: Tensor,
    shape: tuple[int, ...],
    channel_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centre: bool,
    residual: Tensor | None,
    backend: str,
    part: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise by checked arguments; several last dims as one."""
    x, second = input, residual
    if len(shape) > 1:
        x, second = x.flatten(-len(shape)), None if second is None else second.flatten(-len(shape))
        weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    y, h = row_norm(
        x, weight, bias, eps, centre=centre, residual=second, part=part, dim=channel_dim % x.dim(), backend=backend
    )
    if len(shape) > 1:
        y, h = y.view(input.shape), h.view(input.shape)
    return y if residual is None else (y, h)


def normalized_shape(dim: int | Sequence[int]) -> tuple[int, ...]:
    """``dim`` as a shape."""
    return tuple(dim) if isinstance(dim, Sequence) else (int(dim),)  # while traced by torch.jit, sizes are tensors


def check_normalized(
    name: str, input: Tensor, dim: int | Sequence[int], channel_dim: int, residual: Tensor | None = None
) -> tuple[int, ...]:
    """The shape that is normalised together; raise unless ``input`` is floating point and has it, and the residual fits."""
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
    check_residual(input, residual)
    return shape
