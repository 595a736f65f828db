"""First and second derivative of synchronised batch normalisation: each meets the other ranks once more.

The exchange does not depend on what needs a gradient on this rank, so ranks that differ there still meet.
"""

# C channels; flat tensors are [N, C, S] or [M, C]

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.backward import double_backward_input, double_backward_sums
from syncnorm.core.layout import accumulate_dtype, channel_view, flatten, flatten_like, unflatten
from syncnorm.core.moments import at_least_one
from syncnorm.distributed.exchange import exchange_means
from syncnorm.errors import SyncNormError
from syncnorm.functional._walk import Walk, empty_after, tells
from syncnorm.kernels import choose

__all__ = ["Backward", "batch_backward"]


def batch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    side: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor | float,
    walk: Walk,
    needs_input_grad: bool,
    needs_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of the input, of the residual (None where it is ``grad``), this rank's Σg' and Σg'·x̂, and their means.

    ``side`` is what the backward primitives take: the mask, or the residual [N, C, *].
    """
    if not x.numel():
        zero = (grad * x).transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)  # of x, too: see moments_of_none
        sums = torch.stack([zero, zero])
        means = exchange_means(sums, at_least_one(count), walk.group, walk.call)
        return empty_after(means[0], x), None, sums, means
    backend, flat = choose(walk.backend, x), flatten(x)
    grad = flatten_like(grad, flat)
    if walk.activation is None:
        sums = backend.batch_backward_reduce(grad, flat, mean, rstd)
    else:
        if side is not None and not walk.activation.is_piecewise_linear:
            side = flatten_like(side, flat)
        sums = backend.batch_backward_reduce(grad, flat, mean, rstd, weight, bias, walk.activation, side)
    means = exchange_means(sums, count, walk.group, walk.call)
    dx = dresidual = None
    if needs_input_grad or (needs_residual and walk.activation is not None):
        dx, dresidual = backend.batch_backward_input(
            grad, flat, mean, rstd, weight, means, bias, walk.activation, side, needs_residual
        )
        dx = unflatten(dx, x.shape)
        dresidual = None if dresidual is None else unflatten(dresidual, x.shape)
    return dx, dresidual, sums, means


class Backward(Function):
    """First backward as a function of its own, so that it has a derivative: one more exchange, of five sums."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        count: Tensor | float,
        walk: Walk,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        dx, _, sums, means = batch_backward(
            grad, x, weight, None, None, mean, rstd, count, walk, needs_input_grad, False
        )  # fmt: skip
        return dx, sums[1], sums[0], means

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        grad, x, weight, mean, rstd, count, walk, _ = inputs
        means = output[3]
        ctx.mark_non_differentiable(means)
        count_tensor, ctx.count = (count, None) if isinstance(count, Tensor) else (None, count)
        ctx.save_for_backward(grad, x, weight, mean, rstd, means, count_tensor)
        ctx.walk = walk

    @staticmethod
    @tells("second backward", lambda ctx, *_: ctx.walk)
    def backward(ctx: Any, v: Tensor | None, a: Tensor, b: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = Backward._second(ctx, v, a, b)
        if torch.is_grad_enabled():  # create_graph=True once more
            gradients = _LastDerivative.apply(v, a, b, *ctx.saved_tensors[:3], *gradients)  # type: ignore[no-untyped-call]
        return *gradients, None, None, None, None, None

    @staticmethod
    def _second(ctx: Any, v: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        grad, x, weight, mean, rstd, means, count = ctx.saved_tensors
        count = ctx.count if count is None else count
        accumulate = accumulate_dtype(x.dtype)
        shape, empty = x.shape, not x.numel()
        flat = (x.flatten(2) if x.dim() > 2 else x) if empty else flatten(x)
        v = torch.zeros_like(x) if v is None else v
        v_flat, g_flat = ((u.reshape(flat.shape) if empty else flatten_like(u, flat)).to(accumulate) for u in (v, grad))
        mean_v, rstd_v = (channel_view(u.to(accumulate), flat) for u in (mean, rstd))
        x_hat = (flat.to(accumulate) - mean_v) * rstd_v
        a, b, rstd = a.to(accumulate), b.to(accumulate), rstd.to(accumulate)
        gamma = torch.ones_like(rstd) if weight is None else weight.to(accumulate)
        sums = double_backward_sums(v_flat, a, g_flat, x_hat)
        more = exchange_means(sums, at_least_one(count), ctx.walk.group, ctx.walk.call, "second backward")
        all_means = torch.cat([means, more]).to(accumulate)
        grad_g, grad_x, grad_weight = double_backward_input(
            v_flat, a, b, g_flat, x_hat, rstd, gamma, all_means
        )  # fmt: skip
        if empty:
            grad_g, grad_x = grad_g.reshape(shape), grad_x.reshape(shape)
        else:
            grad_g, grad_x = unflatten(grad_g, shape), unflatten(grad_x, shape)
        grad_weight_out = None if weight is None else grad_weight.to(weight.dtype)
        return grad_g.to(x.dtype), grad_x.to(x.dtype), grad_weight_out


class _LastDerivative(Function):
    """Hands the second derivative on; whoever differentiates it is told that there is no third.

    ``once_differentiable`` would not: its error hangs on no input, and ``autograd.grad`` walks around it.
    """

    @staticmethod
    def forward(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[6:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise SyncNormError(
            "a synchronised layer has first and second derivatives, and a third was asked for. If one process is meant, "
            "`with syncnorm.disabled(model):` leaves the layer to torch, which has all of them."
        )
