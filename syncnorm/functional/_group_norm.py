"""Group norm, with an activation if one follows."""

# N batch, C channels, G groups

from torch import Tensor

from syncnorm.core.activation import Activation, find_activation
from syncnorm.functional._inputs import accumulate_dtype, check_channels, over_dim, same_dtype, with_layout_of
from syncnorm.functional._rows import group_norm_of
from syncnorm.kernels.rows import choose_rows

__all__ = ["check_groups", "group_norm"]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Normalise each sample over groups of adjacent channels and over space: ``y = act((x - μ) / sqrt(σ² + eps) · γ + β)``.

    A group with a single value (1×1 maps with one channel per group) has no spread: its output is β, and its gradient
    to the input is 0. torch returns rounding noise there, or raises.

    Args:
        input: ``[N, C, *]``, any floating dtype, any layout; N may be 0.
        num_groups: G, a divisor of C. 1 is layer norm over channels and space, C is instance norm.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        eps: Added to the (biased) variance.
        activation: Applied last: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"`` (the exact form), or None. What it
            was applied to is not kept for the backward but computed again from ``input``.
        negative_slope: Of ``"leaky_relu"``.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Returns:
        Tensor like ``input``, in its dtype and layout. Statistics are at least float32.

    Raises:
        ValueError: If C does not fit ``weight``, G does not divide C, or the activation is unknown.
        TypeError: If the input is not floating point.

    Reference: Wu & He (2018), equations 1, 2 and 7.
    """
    vector = weight if weight is not None else bias
    check_channels("group_norm", input, None if vector is None else vector.numel())
    check_groups("group_norm", input.size(1), num_groups)
    act = find_activation(activation, negative_slope)
    if input.shape[1:].numel() == num_groups:
        choose_rows(backend, input)
        return with_layout_of(input, _single_values(input, weight, bias, act))
    y = group_norm_of(input, num_groups, weight, bias, eps, backend=backend, activation=act)
    return with_layout_of(input, y)


def _single_values(x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: Activation | None) -> Tensor:
    dtype = x.dtype
    if not same_dtype(x, weight, bias):
        x = x.to(accumulate_dtype(dtype))
    y = x * 0  # not zeros: what is not finite shows
    y = y if weight is None else y * over_dim(weight.to(x.dtype), x, 1)
    y = y if bias is None else y + over_dim(bias.to(x.dtype), x, 1)
    return (y if activation is None else activation(y)).to(dtype)


def check_groups(name: str, num_channels: int, num_groups: int) -> None:
    """Raise ValueError unless ``num_groups`` divides ``num_channels``."""
    if num_groups < 1 or num_channels % num_groups:
        divisors = ", ".join(str(n) for n in range(1, num_channels + 1) if num_channels % n == 0)
        raise ValueError(
            f"{name}: num_groups must divide the number of channels, got num_groups={num_groups} for {num_channels} "
            f"channels. Use one of {divisors}."
        )
