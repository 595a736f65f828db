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
from syncnorm.core.traced import is_transformed
from syncnorm.functional._inputs import channels_are_inner, with_layout_of
from syncnorm.functional._walk import apply_function
from syncnorm.kernels import reference_rows
from syncnorm.kernels.rows import ROW_BACKENDS, RowBackend, choose_rows, takes_features_apart

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
    dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Normalise ``h = x + residual`` over ``dim``, where D is; see :meth:`RowBackend.row_norm_forward`.

    Returns:
        The norm and h, in the layout of ``x`` where D is not last, else contiguous; without a residual h is ``x``.
    """
    kernel = choose_rows(backend, x)
    kernel = kernel if x.numel() else _ATEN
    if _records_itself(kernel, x, centre):
        second = None if residual is None else _last(residual, dim)
        y, h, *_ = kernel.row_norm_forward(_last(x, dim), weight, bias, eps, centre, second, part)
        y, h = _back(y, x, dim), None if h is None else _back(h, x, dim)
    elif torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
        y, h = _apply(_RowNorm, x, weight, bias, residual, eps, centre, part, dim, kernel)
    else:
        apart = _lies_apart(_last(x, dim), part, kernel)
        y, h, *_ = _forward_rows(x, weight, bias, residual, eps, centre, part, dim, kernel, apart)
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
    # Torch's own backward of channels_last crashes on CPU where x needs no gradient (2.13).
    if _records_itself(kernel, x, activation is None and not channels_are_inner(x)):
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
    if torch.compiler.is_compiling() or is_transformed():
        return True
    return kernel is _ATEN and (lean or x.device.type != "cpu" or not x.numel())


def _apply(function: type[Function], *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    return apply_function(function, *arguments)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _forward_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    centre: bool,
    part: int | None,
    dim: int,
    kernel: RowBackend,
    apart: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    last = _last(x, dim)
    second = None if residual is None else _rows(_last(residual, dim), apart)
    y, h, mean, rstd = kernel.row_norm_forward(_rows(last, apart), weight, bias, eps, centre, second, part)
    y = _owned(_back(y.view(last.shape), x, dim))
    h = None if h is None else _owned(_back(h.view(last.shape), x, dim))
    return y, h, mean, rstd


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
        dim: int,
        kernel: RowBackend,
    ) -> tuple[Tensor, Tensor | None]:
        apart = _lies_apart(_last(x, dim), part, kernel)  # asked here: Dynamo lets no backward ask how a tensor lies
        y, h, mean, rstd = _forward_rows(x, weight, bias, residual, eps, centre, part, dim, kernel, apart)
        ctx.save_for_backward(x if h is None else h, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.arguments, ctx.bias_dtype = (eps, centre, part, dim, kernel, apart), None if bias is None else bias.dtype
        return y, h

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, mean, rstd = ctx.saved_tensors
        eps, centre, part, dim, kernel, apart = ctx.arguments
        if grad is None:
            return grad_h, None, None, grad_h, *[None] * 5
        last = _last(h, dim)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            kernel, apart = _REFERENCE, False
            mean, rstd = reference_rows.row_statistics(_rows(last), eps, centre, part)
        rows, grad = _rows(last, apart), _rows(_last(grad, dim), apart)
        grad_h = None if grad_h is None else _rows(_last(grad_h, dim), apart)
        _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dx, dweight, dbias = kernel.row_norm_backward(
            grad, rows, weight, mean, rstd, needs_weight, needs_bias, grad_h, part
        )
        dx = dx.view(last.shape)
        dx = dx if last is h else dx.movedim(-1, dim)
        return (
            dx,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            dx if needs_residual else None,
            *[None] * 5,
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
        return _owned(y.view(x.shape))

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


def _last(x: Tensor, dim: int) -> Tensor:
    """``x`` with ``dim`` as the last."""
    return x if dim == -1 or dim == x.dim() - 1 else x.movedim(dim, -1)


def _back(result: Tensor, x: Tensor, dim: int) -> Tensor:
    """What was formed from ``_last(x, dim)`` in the shape and layout of ``x``."""
    return result if dim == -1 or dim == x.dim() - 1 else with_layout_of(x, result.movedim(-1, dim))


def _lies_apart(x: Tensor, part: int | None, kernel: RowBackend) -> bool:
    """Whether ``x`` [*, D] lies as [N, D, *], and the kernel takes that as it is."""
    return (
        part is None
        and x.dim() > 2
        and not x.is_contiguous()
        and takes_features_apart(kernel, x)
        and x.movedim(-1, 1).is_contiguous()
    )


def _rows(x: Tensor, apart: bool = False) -> Tensor:
    """``x`` [*, D] as contiguous [M, D], or if ``apart`` as [N, S, D] of contiguous [N, D, S]; a view if it lies so."""
    if apart:
        return x.movedim(-1, 1).contiguous().flatten(2).transpose(1, 2)
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


def _owned(result: Tensor) -> Tensor:
    """``result`` as no view to autograd, for whoever changes it in place."""
    return result.clone() if torch.compiler.is_compiling() else result.data
