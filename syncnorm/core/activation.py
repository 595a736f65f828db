"""The activations that a norm can apply itself, what they do to a gradient, and signs packed one bit an element."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "Activation", "find_activation", "pack_bits", "unpack_bits"]

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu")

_BITS = 8


class Activation(NamedTuple):
    """An elementwise function after a norm.

    Attributes:
        name: One of :data:`ACTIVATIONS`; ``"gelu"`` is the exact form, with erf.
        negative_slope: Of ``"leaky_relu"``.
    """

    name: str
    negative_slope: float = 0.01

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether the sign of its input is all that the gradient needs."""
        return self.name in ("relu", "leaky_relu")

    def __call__(self, pre: Tensor) -> Tensor:
        """The function of ``pre``; differentiable."""
        if self.name == "relu":
            return functional.relu(pre)
        if self.name == "leaky_relu":
            return functional.leaky_relu(pre, self.negative_slope)
        return functional.silu(pre) if self.name == "silu" else functional.gelu(pre)

    def apply_(self, pre: Tensor) -> Tensor:
        """The function, in place; for tensors that autograd does not see."""
        if self.name == "relu":
            return pre.relu_()
        if self.name == "leaky_relu":
            return functional.leaky_relu_(pre, self.negative_slope)
        if self.name == "silu":
            return functional.silu(pre, inplace=True)
        return torch.ops.aten.gelu_(pre)  # type: ignore[no-any-return]

    def backward(self, grad: Tensor, pre: Tensor) -> Tensor:
        """``grad`` times the derivative at ``pre``; differentiable in both."""
        if self.name == "relu":
            return torch.ops.aten.threshold_backward(grad, pre, 0)  # type: ignore[no-any-return]
        if self.name == "leaky_relu":
            return torch.ops.aten.leaky_relu_backward(grad, pre, self.negative_slope, False)  # type: ignore[no-any-return]
        if self.name == "silu":
            if torch.is_grad_enabled():  # ATen's operator has no derivative
                gate = pre.sigmoid()
                return grad * gate * (1 + pre * (1 - gate))
            return torch.ops.aten.silu_backward(grad, pre)  # type: ignore[no-any-return]
        return torch.ops.aten.gelu_backward(grad, pre)  # type: ignore[no-any-return]

    def inverse(self, y: Tensor) -> Tensor:
        """What ``y`` was made from; for ``"leaky_relu"`` of a positive slope."""
        return functional.leaky_relu(y, 1 / self.negative_slope)

    def backward_by_sign(self, grad: Tensor, positive: Tensor) -> Tensor:
        """``grad`` times the derivative, from where the input was positive; for the piecewise linear ones."""
        return torch.where(positive, grad, grad * self.negative_slope if self.name == "leaky_relu" else 0.0)


def find_activation(name: "str | Activation | None", negative_slope: float = 0.01) -> Activation | None:
    """The activation of that name; None for None, and an activation for itself.

    Raises:
        ValueError: For an unknown name.
    """
    if name is None or isinstance(name, Activation):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be None or one of {list(ACTIVATIONS)}, got {name!r}. Another function can follow the norm "
            "as a layer of its own."
        )
    return Activation(name, float(negative_slope))


def pack_bits(flags: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into uint8 ``[ceil(n / 8)]``, the first flag in the lowest bit."""
    flat = flags.reshape(-1)
    flat = functional.pad(flat, (0, -flat.numel() % _BITS)).view(-1, _BITS)
    weights = 1 << torch.arange(_BITS, device=flags.device, dtype=torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The bool tensor of that shape that :func:`pack_bits` packed."""
    places = torch.arange(_BITS, device=bits.device, dtype=torch.uint8)
    flags = (bits.unsqueeze(1) >> places) & 1
    return flags.view(-1)[: shape.numel()].view(shape).bool()
