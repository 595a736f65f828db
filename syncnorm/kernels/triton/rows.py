"""Row and group norms by the triton kernels."""

# M rows, D features; N batch, C channels, S flattened space, G groups

import torch
from torch import Tensor
from torch.autograd import forward_ad

from syncnorm.core.activation import Activation
from syncnorm.kernels import triton
from syncnorm.kernels.triton import found, primitives, spelled, stands_back

__all__ = [
    "group_norm_backward",
    "group_norm_forward",
    "objection",
    "row_norm_backward",
    "row_norm_forward",
    "stands_back",
]


def objection(x: Tensor) -> str | None:
    """Why these kernels cannot serve ``x``."""
    reason = triton.objection(x)
    if reason is not None:
        return reason
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func's transforms do not see into the triton kernels."
    if forward_ad._current_level >= 0:
        return "the triton kernels have no forward-mode derivative."
    return None


def row_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    residual: Tensor | None = None,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``(h - mean)·rstd·weight + bias`` of each row of ``h = x + residual``; and h, mean and rstd."""
    y, h, mean, rstd = primitives(x).row_forward(x, weight, bias, eps, centre, residual, part)
    return y, found(h), found(mean), rstd


def row_norm_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_bias: bool,
    grad_h: Tensor | None = None,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input (and of the residual), of the weight and of the bias."""
    dx, dweight, dbias = primitives(h).row_backward(
        grad, h, weight, mean, rstd, needs_weight, needs_bias, grad_h, part
    )  # fmt: skip
    return dx, found(dweight), found(dbias)


def group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean)·rstd·weight + bias)`` in the layout of ``x``; mean and rstd, ``[N, G]``."""
    y, mean, rstd = primitives(x).group_forward(x, num_groups, weight, bias, eps, *spelled(activation))
    return y, mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, in its layout, and of weight and bias ``[C]``."""
    dx, dweight, dbias = primitives(x).group_backward(
        grad, x, num_groups, weight, bias, mean, rstd, *spelled(activation)
    )  # fmt: skip
    return dx, dweight, dbias
