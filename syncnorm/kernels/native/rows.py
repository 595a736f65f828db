"""Row and group norms by our own C++ operators: a row is read once from memory, whatever is done to it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from syncnorm.core.activation import Activation
from syncnorm.core.layout import accumulate_dtype
from syncnorm.core.traced import constant_while_traced, is_exporting
from syncnorm.kernels import native

__all__ = [
    "group_norm_backward",
    "group_norm_forward",
    "objection",
    "row_norm_backward",
    "row_norm_forward",
    "takes_features_apart",
]

_POSITIONS = 8  # fewer side by side cost more than a copy

_ops = torch.ops.syncnorm  # with the overload named at each call: a packet looks for it every time


def objection(x: Tensor) -> str | None:
    """Why these operators cannot serve ``x``."""
    reason = native.objection(x)
    if reason is not None:
        return reason
    if is_exporting() or torch.jit.is_tracing():
        return "an exported program must run where the native operators are not."
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func's transforms do not see into the native operators."
    if forward_ad._current_level >= 0:
        return "the native operators have no forward-mode derivative."
    _register_fakes()
    return None


def takes_features_apart(x: Tensor) -> bool:
    """Whether vectors of positions of ``x`` [N, *, D] are full enough."""
    return x.shape[1:-1].numel() >= _POSITIONS


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
    y, h, mean, rstd = _ops.row_norm_forward.default(x, weight, bias, eps, centre, residual, part)
    return y, None if residual is None else h, mean if centre else None, rstd


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
    """``dx = rstd·(u - ⟨u⟩ - x̂⟨u·x̂⟩) + grad_h`` with ``u = grad·weight``; Σ grad·x̂ and Σ grad over rows."""
    dx, dweight, dbias = _ops.row_norm_backward.default(
        grad, h, weight, mean, rstd, needs_weight, needs_bias, grad_h, part
    )  # fmt: skip
    return dx, dweight if needs_weight else None, dbias if needs_bias else None


def group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean)·rstd·weight + bias)`` in the layout of ``x``; mean and rstd, ``[N, G]``."""
    y, mean, rstd = _ops.group_norm_forward.default(x, num_groups, weight, bias, eps, *native._code(activation))
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
    """``dx = rstd·(u - ⟨u⟩ - x̂⟨u·x̂⟩)`` with ``u = g'·weight``, ``g' = grad·act'(pre)``; Σ g'·x̂ and Σ g', ``[C]``."""
    dx, dweight, dbias = _ops.group_norm_backward.default(
        grad, x, num_groups, weight, bias, mean, rstd, *native._code(activation)
    )  # fmt: skip
    return dx, dweight, dbias


@constant_while_traced
def _register_fakes() -> None:
    with native._registering:
        _registered()


@cache
def _registered() -> None:
    def forward(x: Tensor, weight: Any, bias: Any, eps: float, centre: bool, residual: Tensor | None, part: Any) -> Any:
        rows = x.numel() // x.size(-1)
        dtype = accumulate_dtype(x.dtype)
        return (
            torch.empty_like(x),
            x.new_empty(0) if residual is None else torch.empty_like(x),
            x.new_empty(rows if centre else 0, dtype=dtype),
            x.new_empty(rows, dtype=dtype),
        )

    def backward(
        grad: Tensor, h: Tensor, weight: Any, mean: Any, rstd: Tensor, needs_weight: bool, needs_bias: bool, *_: Any
    ) -> Any:
        features = h.size(-1)
        dweight, dbias = (rstd.new_empty(features if needed else 0) for needed in (needs_weight, needs_bias))
        return torch.empty_like(h), dweight, dbias

    torch.library.register_fake("syncnorm::row_norm_forward", forward)
    torch.library.register_fake("syncnorm::row_norm_backward", backward)

    def group_forward(x: Tensor, num_groups: int, *_: Any) -> Any:
        mean = x.new_empty(x.size(0), num_groups, dtype=accumulate_dtype(x.dtype))
        return torch.empty_like(x), mean, torch.empty_like(mean)

    def group_backward(grad: Tensor, x: Tensor, num_groups: int, weight: Any, bias: Any, mean: Tensor, *_: Any) -> Any:
        dweight = mean.new_empty(x.size(1))
        return torch.empty_like(x), dweight, torch.empty_like(dweight)

    torch.library.register_fake("syncnorm::group_norm_forward", group_forward)
    torch.library.register_fake("syncnorm::group_norm_backward", group_backward)
