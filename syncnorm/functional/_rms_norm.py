"""RMS norm: layer norm without the centring; and its partial form, whose RMS comes from the first features only."""

# D normalised features, K of them in the RMS

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from syncnorm.functional._inputs import accumulate_dtype, same_dtype, with_layout_of
from syncnorm.functional._layer_norm import check_normalized

__all__ = ["check_part", "rms_norm"]


def rms_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 1.0,
    channel_dim: int = -1,
) -> Tensor:
    """Divide the features of each sample or position by their root mean square: ``y = x / sqrt(⟨x²⟩ + eps) · γ``.

    The authors' code adds eps outside the root, torch and this function inside; apart from inputs near 0 they agree.

    Args:
        input: ``[*, D]``, or D at ``channel_dim``; any floating dtype, any layout; other dims may be 0.
        dim: D, or the sizes of the last dims, which are then normalised together.
        weight: γ, of shape ``dim``, or None.
        eps: Added to the mean square. None for the precision of the statistics: that of float64 for float64 inputs,
            else of float32.
        p: Share of the features that the mean square is taken over: the first ``int(D · p)``, at least one (pRMSNorm).
        channel_dim: Where D is, if not last. Only with a single D.

    Returns:
        Tensor like ``input``, in its dtype and layout. Statistics are at least float32.

    Raises:
        ValueError: If the input has other sizes than ``dim`` there, or ``p`` is not in (0, 1].
        TypeError: If the input is not floating point.

    Reference: Zhang & Sennrich (2019), equation 4; section 5 for the partial form.
    """
    check_part("rms_norm", p)
    shape = check_normalized("rms_norm", input, dim, channel_dim)
    moved = channel_dim % input.dim() != input.dim() - 1 and len(shape) == 1
    x = input.movedim(channel_dim, -1) if moved else input
    dtype = accumulate_dtype(input.dtype)
    eps = torch.finfo(dtype).eps if eps is None else eps
    if p < 1:
        y = _partial_rms_norm(x.to(dtype), shape, weight, eps, p)
    elif same_dtype(input, weight):
        y = functional.rms_norm(x, shape, weight, eps)
    else:
        y = functional.rms_norm(x.to(dtype), shape, None if weight is None else weight.to(dtype), eps)
    y = y.to(input.dtype)
    return with_layout_of(input, y.movedim(-1, channel_dim)) if moved else y


def check_part(name: str, p: float) -> None:
    """Raise ValueError unless ``p`` is a share of the features."""
    if not 0 < p <= 1:
        raise ValueError(f"{name}: p is the share of the features that the RMS is taken over, in (0, 1]; got {p}.")


def _partial_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float, p: float) -> Tensor:
    flat = x.flatten(x.dim() - len(shape))
    first_K = flat[..., : max(1, int(flat.size(-1) * p))]
    y = (flat * torch.rsqrt(first_K.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    return y if weight is None else y * weight
