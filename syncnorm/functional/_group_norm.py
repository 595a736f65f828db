"""Group norm: torch's kernel, with a centre taken off first where that kernel would subtract two large numbers."""

# N batch, C channels, G groups

import torch
from torch import Tensor

from syncnorm.functional._inputs import accumulate_dtype, check_channels, over_dim, same_dtype, with_layout_of

__all__ = ["check_groups", "group_norm"]


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalise each sample over groups of adjacent channels and over space: ``y = (x - μ) / sqrt(σ² + eps) · γ + β``.

    A group with a single value (1×1 maps with one channel per group) has no spread: its output is β, and its gradient
    to the input is 0. torch returns rounding noise there, or raises.

    Args:
        input: ``[N, C, *]``, any floating dtype, any layout; N may be 0.
        num_groups: G, a divisor of C. 1 is layer norm over channels and space, C is instance norm.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        eps: Added to the (biased) variance.

    Returns:
        Tensor like ``input``, in its dtype and layout. Statistics are at least float32.

    Raises:
        ValueError: If C does not fit ``weight``, or G does not divide C.
        TypeError: If the input is not floating point.

    Reference: Wu & He (2018), equations 1, 2 and 7.
    """
    vector = weight if weight is not None else bias
    check_channels("group_norm", input, None if vector is None else vector.numel())
    check_groups("group_norm", input.size(1), num_groups)
    dtype = accumulate_dtype(input.dtype)
    x = input
    if not same_dtype(input, weight, bias):
        x = input.to(dtype)
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    if input.shape[1:].numel() == num_groups:
        y = x * 0  # not zeros: what is not finite shows
        y = y if weight is None else y * over_dim(weight, x, 1)
        y = y if bias is None else y + over_dim(bias, x, 1)
    else:
        y = torch.group_norm(_recentre(x, num_groups), num_groups, weight, bias, eps)
    return with_layout_of(input, y.to(input.dtype))


def check_groups(name: str, num_channels: int, num_groups: int) -> None:
    """Raise ValueError unless ``num_groups`` divides ``num_channels``."""
    if num_groups < 1 or num_channels % num_groups:
        divisors = ", ".join(str(n) for n in range(1, num_channels + 1) if num_channels % n == 0)
        raise ValueError(
            f"{name}: num_groups must divide the number of channels, got num_groups={num_groups} for {num_channels} "
            f"channels. Use one of {divisors}."
        )


def _recentre(x: Tensor, num_groups: int) -> Tensor:
    """Take a number near its mean off each group; the result of the norm, and every derivative, stays the same.

    ATen's CPU kernel for channels_last forms E[x²] − E[x]² in the input's precision: in float32 at mean/std = 1e3 its
    output is off by 1.6 (torch 2.13). The mean of one row will do as the number: what is lost is then at most the
    precision times the number of rows.
    """
    if x.device.type != "cpu" or x.dim() not in (4, 5) or not x.numel():
        return x
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous() and not x.is_contiguous(memory_format=channels_last):
        return x
    row = x.detach().select(2, x.size(2) // 2).flatten(2)
    group_mean = row.mean(2, dtype=accumulate_dtype(x.dtype)).unflatten(1, (num_groups, -1)).mean(2, keepdim=True)
    centre = group_mean.expand(-1, -1, x.size(1) // num_groups).flatten(1).to(x.dtype)
    recentred: Tensor = x - centre.reshape(*centre.shape, *[1] * (x.dim() - 2))
    return recentred
