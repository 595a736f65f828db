"""Norms of rows and of groups of channels as differentiable functions over the second seam.

What stays until the backward is the input (behind the residual) and a few numbers a row. A second derivative is taken of
the reference's formulas, by torch, from the input on; so there are all further ones.
"""

# D normalised features; N batch, C channels, S flattened space

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.activation import Activation
from syncnorm.functional._inputs import channels_are_inner
from syncnorm.functional._walk import apply_function
from syncnorm.kernels import reference_rows
from syncnorm.kernels.rows import ROW_BACKENDS, RowBackend, choose_rows

__all__ = ["group_norm_of", "row_norm"]

_ATEN, _REFERENCE = ROW_BACKENDS["aten"], ROW_BACKENDS["reference"]


def row_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centre: bool,
    backend: str,
    residual: Tensor | None = None,
    part: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise the last dim of ``h = x + residual``, [*, D]; see :meth:`RowBackend.row_norm_forward`.

    Returns:
        The norm and h, both contiguous; without a residual h is ``x``.
    """
    kernel = choose_rows(backend, x)
    kernel = kernel if x.numel() else _ATEN
    if _records_itself(kernel, x, centre):
        y, h, *_ = kernel.row_norm_forward(x, weight, bias, eps, centre, residual, part)
    elif torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
        y, h = _apply(_RowNorm, x, weight, bias, residual, eps, centre, part, kernel)
    else:
        second = None if residual is None else _rows(residual)
        y, h, *_ = kernel.row_norm_forward(_rows(x), weight, bias, eps, centre, second, part)
        y, h = y.view(x.shape), None if h is None else h.view(x.shape)
    return y, x if h is None else h


def group_norm_of(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    backend: str,
    activation: Activation | None = None,
) -> Tensor:
    """Normalise groups of channels of ``x`` [N, C, *]; see :meth:`RowBackend.group_norm_forward`."""
    kernel = choose_rows(backend, x)
    kernel = kernel if x.numel() else _ATEN
    if _records_itself(kernel, x, activation is None):
        flat = _flat(x) if kernel is _REFERENCE else x
        return kernel.group_norm_forward(flat, num_groups, weight, bias, eps, activation)[0].reshape(x.shape)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias):
        return _apply(_GroupNorm, x, weight, bias, num_groups, eps, activation, kernel)  # type: ignore[no-any-return]
    return kernel.group_norm_forward(_flat(x), num_groups, weight, bias, eps, activation)[0].view(x.shape)


def _records_itself(kernel: RowBackend, x: Tensor, lean: bool) -> bool:
    """Whether autograd records the forward primitive itself: so the compiler and torch.func's transforms see all of it.

    ``lean`` says that torch's operators keep no more than the input.
    """
    if kernel is not _ATEN and kernel is not _REFERENCE:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return kernel is _ATEN and (lean or x.device.type != "cpu" or not x.numel())


def _apply(function: type[Function], *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    return apply_function(function, *arguments)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


class _RowNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        centre: bool,
        part: int | None,
        kernel: RowBackend,
    ) -> tuple[Tensor, Tensor | None]:
        second = None if residual is None else _rows(residual)
        y, h, mean, rstd = kernel.row_norm_forward(_rows(x), weight, bias, eps, centre, second, part)
        y, h = _shaped(y, x), None if h is None else _shaped(h, x)
        ctx.save_for_backward(x if h is None else h, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.arguments, ctx.bias_dtype = (eps, centre, part, kernel), None if bias is None else bias.dtype
        return y, h

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, mean, rstd = ctx.saved_tensors
        eps, centre, part, kernel = ctx.arguments
        if grad is None:
            return grad_h, None, None, grad_h, *[None] * 4
        rows = _rows(h)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            kernel, (mean, rstd) = _REFERENCE, reference_rows.row_statistics(rows, eps, centre, part)
        _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dx, dweight, dbias = kernel.row_norm_backward(
            _rows(grad), rows, weight, mean, rstd, needs_weight, needs_bias, None if grad_h is None else _rows(grad_h), part
        )  # fmt: skip
        dx = dx.view(h.shape)
        return (
            dx,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            dx if needs_residual else None,
            *[None] * 4,
        )


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        activation: Activation | None,
        kernel: RowBackend,
    ) -> Tensor:
        y, mean, rstd = kernel.group_norm_forward(_flat(x), num_groups, weight, bias, eps, activation)
        ctx.save_for_backward(x, weight, None if activation is None else bias, mean, rstd)
        ctx.arguments = num_groups, eps, activation, kernel
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups, eps, activation, kernel = ctx.arguments
        flat = _flat(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            kernel, (mean, rstd) = _REFERENCE, reference_rows.group_statistics(flat, num_groups, eps)
            grad = grad.reshape(flat.shape)
        else:
            grad = _laid_out_as(flat, grad)
        dx, dweight, dbias = kernel.group_norm_backward(grad, flat, num_groups, weight, bias, mean, rstd, activation)
        return (
            dx.view(x.shape),
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            *[None] * 4,
        )


def _rows(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.dim() == 2 else x.view(-1, x.size(-1))


def _flat(x: Tensor) -> Tensor:
    """``x`` [N, C, *] as [N, C, S]: a view where it is contiguous or its channels are innermost."""
    if x.dim() == 2:
        return x.contiguous().unsqueeze(-1)
    return (x if x.is_contiguous() or channels_are_inner(x) else x.contiguous()).flatten(2)


def _laid_out_as(flat: Tensor, grad: Tensor) -> Tensor:
    grad = grad.reshape(flat.shape)
    return grad if grad.stride() == flat.stride() else torch.empty_like(flat).copy_(grad)


def _shaped(result: Tensor, x: Tensor) -> Tensor:
    """``result`` in the shape of ``x``. No view to autograd, for whoever changes it in place."""
    shaped = result.view(x.shape)
    return shaped.clone() if torch.compiler.is_compiling() else shaped.data
