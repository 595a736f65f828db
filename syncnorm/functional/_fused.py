"""What may follow a norm within the same call, a residual and an activation, and what makes them wrong."""

import torch
from torch import Tensor

from syncnorm.core.activation import Activation

__all__ = ["check_invertible", "check_residual", "follow"]

# x̂ = (y - β)/γ is off by about eps·(1 + |β/γ|): 7 bits lost at most, and γ itself well above the smallest float16.
_LARGEST_SHIFT = 2.0**7
_SMALLEST_SCALE = 2.0**-10


def follow(y: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
    """Add the residual and apply the activation, as operations of their own."""
    if residual is not None:
        check_residual(y, residual)
        y = y + residual
    return y if activation is None else activation(y)


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError unless ``residual`` can be added to the result without a change of its shape or dtype."""
    if residual is None:
        return
    if (input.shape, input.dtype, input.device) != (residual.shape, residual.dtype, residual.device):
        shown = " against ".join(
            f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (residual, input)
        )
        raise ValueError(
            f"residual must have the shape, dtype and device of the input, got {shown}. Expand or convert it, for example "
            "with residual.expand_as(x).to(x.dtype)."
        )


def check_invertible(
    weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: Activation | None
) -> None:
    """Raise ValueError unless the input can be found again from the output."""
    needs = "memory_efficient=True finds the input again from the output"
    if residual is not None:
        raise ValueError(
            f"{needs}, which a residual makes impossible. Use memory_efficient=False, or add it afterwards."
        )
    if activation is not None and not (activation.name == "leaky_relu" and activation.negative_slope > 0):
        slope = f" with negative_slope={activation.negative_slope}" if activation.name == "leaky_relu" else ""
        raise ValueError(
            f"{needs}, so it goes with no activation or a leaky_relu of positive slope; got {activation.name!r}{slope}."
        )
    if weight is None:
        return
    weight = weight.detach().float()
    limit = torch.full_like(weight, _SMALLEST_SCALE) if bias is None else bias.detach().float().abs() / _LARGEST_SHIFT
    too_small = weight.abs() < limit.clamp(min=_SMALLEST_SCALE)
    at_least = f"{_SMALLEST_SCALE:g} and |bias|/{_LARGEST_SHIFT:g} in size"
    message = f"{needs} by dividing by the weight, which must be at least {at_least}"
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        torch._assert_async(~too_small.any(), f"{message}.")
    elif bool(too_small.any()):
        channels = too_small.nonzero().flatten().tolist()
        raise ValueError(
            f"{message}; it is smaller in {len(channels)} of {weight.numel()} channels, the first of them {channels[:5]}. "
            "Use memory_efficient=False for this layer (a weight that starts at zero is one such case)."
        )
