"""The walk of synchronised batch normalisation as a differentiable function.

Local moments, ranks meet, normalise with what follows; and back: local sums, ranks meet, input gradient.
"""

# C channels; flat tensors are [N, C, S] or [M, C]

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.layout import count_per_channel, flatten, flatten_like, unflatten
from syncnorm.core.moments import Moments
from syncnorm.core.renorm import correct_affine, renorm_correction
from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.exchange import exchange_moments
from syncnorm.distributed.ledger import begin_call
from syncnorm.errors import SyncNormError
from syncnorm.functional._batch_backward import Backward, batch_backward
from syncnorm.functional._checkpoint import (
    is_recomputing,
    is_selective,
    recall_call,
    remember_call,
    unseen_by_selective_checkpointing,
)
from syncnorm.functional._nonfinite import refuse_nonfinite
from syncnorm.functional._one_value import ONE_VALUE, refuse_one_value
from syncnorm.functional._walk import Walk, apply_function, empty_after, moments_of_none, tells
from syncnorm.functional._whole import whole_backward, whole_forward
from syncnorm.kernels import choose
from syncnorm.kernels.vectors import inverse_std, update_running

__all__ = ["batch_normalize", "batch_normalize_and_moments"]


def batch_normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    walk: Walk,
    running: RunningStatistics | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise ``x`` [N, C, *] by the moments of all ranks and move the running statistics, in place.

    Raises:
        ValueError: On every rank, if the group holds one value per channel in all; nothing has been changed then.
        SyncNormMismatch: If ranks disagree, see :func:`syncnorm.distributed.exchange.exchange_moments`.
    """
    return batch_normalize_and_moments(x, weight, bias, walk, running, residual)[0]


def batch_normalize_and_moments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    walk: Walk,
    running: RunningStatistics | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """:func:`batch_normalize`, and the moments that it normalised by, which carry no gradient."""
    if not torch.compiler.is_compiling():
        if walk.group.size > 1:
            walk = walk._replace(call=begin_call(walk.site, walk.group, x))
        # Inside, because there torch.func's wrappers are off and buffers may be written in place.
        y, mean, m2, _, count, *_ = apply_function(_Normalize, x, weight, bias, residual, walk, running)
        return y, Moments(count, mean, m2)
    y, mean, m2, _, count, *_ = _Normalize.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, residual, walk, None if walk.renorm is None else running
    )
    if count_per_channel(x) <= 1 and isinstance(count, Tensor):
        torch._assert_async(count != 1, ONE_VALUE)
    if running is not None:
        update_running(running, Moments(count, mean, m2))
    return y, Moments(count, mean, m2)


class _Normalize(Function):
    @staticmethod
    @tells("forward", lambda *arguments: arguments[4])
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        walk: Walk,
        running: RunningStatistics | None,
    ) -> tuple[Any, ...]:
        eager = not torch.compiler.is_compiling()
        recomputing = eager and is_recomputing()
        if not x.numel():
            moments, rstd, correction = _meet(x, None, walk, running, recomputing)
            y = empty_after(rstd, x)
            bits = None
        else:
            backend, flat = choose(walk.backend, x), flatten(x)
            residual = None if residual is None else flatten_like(residual, flat)
            plain = walk.is_plain and walk.known is None and not recomputing and not is_selective()
            whole = whole_forward(backend, flat, x.shape, weight, bias, walk, residual) if plain else None
            if whole is not None:
                y, moments, rstd, bits = whole
                correction = ()
            else:
                moments, rstd, correction = _meet(x, flat, walk, running, recomputing)
                if correction:
                    weight, bias = correct_affine(weight, bias, correction, x.dtype)
                y, bits = backend.batch_normalize(flat, moments.mean, rstd, weight, bias, walk.activation, residual)
            y = unflatten(y, x.shape)
            # The same memory but no view, for the ReLU(inplace=True) that often follows; Inductor makes no copy of this one.
            y = y.data if eager else y.clone()
        if eager and not recomputing:
            remember_call(walk.site, walk.call, (moments, correction))
        if running is not None and eager and not recomputing:
            with unseen_by_selective_checkpointing():
                update_running(running, moments, walk.backend)
        count = moments.count
        if not eager and not isinstance(count, Tensor):
            count = rstd.new_full((), count)  # Dynamo asks every output for a gradient that is a tensor
        return y, moments.mean, moments.m2, rstd, count, *correction, *(() if bits is None else (bits,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, residual, walk, _ = inputs
        y, mean, m2, rstd, count, *rest = output
        corrections = 0 if walk.renorm is None else 2
        correction, side = rest[:corrections], rest[corrections] if len(rest) > corrections else None
        ctx.mark_non_differentiable(*(t for t in output[1:] if isinstance(t, Tensor)))
        ctx.set_materialize_grads(False)
        count_tensor, ctx.count = (count, None) if isinstance(count, Tensor) else (None, count)
        act = walk.activation
        if act is not None and residual is not None and not act.is_piecewise_linear:
            side = residual
        ctx.bias_dtype = None if bias is None else bias.dtype
        # What the activation was applied to is computed again from x, and x from y where only that is kept.
        recomputed = act is not None or walk.memory_efficient
        kept = y if walk.memory_efficient else x
        ctx.save_for_backward(
            kept, weight, bias if recomputed else None, side, mean, m2, rstd, count_tensor, *correction
        )
        ctx.walk = walk

    @staticmethod
    @tells("backward", lambda ctx, *_: ctx.walk)
    def backward(ctx: Any, grad: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, side, mean, m2, rstd, count, *correction = ctx.saved_tensors
        walk: Walk = ctx.walk
        if grad is None:
            grad = torch.zeros_like(x)
        if count is None:
            count = ctx.count
        effective, shift = correct_affine(weight, bias, correction, x.dtype) if correction else (weight, bias)
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        if walk.memory_efficient:
            grad, x, effective, mean, rstd = _from_output(grad, x, effective, shift, rstd, walk, differentiable)
            walk = walk._replace(activation=None, memory_efficient=False)
        elif differentiable and walk.activation is not None:
            known = walk._replace(known=(Moments(count, mean, m2), tuple(correction)))
            grad = _before_activation(grad, x, weight, bias, side, effective, shift, rstd, known)
            walk = walk._replace(activation=None)
        dresidual: Tensor | None = None
        if differentiable:
            dx, dweight, dbias, _ = apply_function(
                Backward, grad, x, effective, mean, rstd, count, walk, ctx.needs_input_grad[0]
            )  # fmt: skip
        else:
            dx, dresidual, dbias, dweight = _first_derivative(
                grad, x, effective, shift, side, mean, rstd, count, walk, ctx.needs_input_grad
            )  # fmt: skip
        if correction:
            dweight = dweight * correction[0] + dbias * correction[1]
        return (
            dx if ctx.needs_input_grad[0] else None,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            (grad if dresidual is None else dresidual) if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def _meet(
    x: Tensor, flat: Tensor | None, walk: Walk, running: RunningStatistics | None, recomputing: bool
) -> tuple[Moments, Tensor, tuple[Tensor, ...]]:
    """Moments over all ranks, 1/std, and the correction of batch renormalisation; ``flat`` is None for an empty shard."""
    with unseen_by_selective_checkpointing():
        moments, correction = walk.known or (recall_call(walk.site, walk.call) if recomputing else None) or (None, ())
        if moments is None:
            local = moments_of_none(x) if flat is None else choose(walk.backend, x).batch_moments(flat)
            moments = exchange_moments(local, walk.group, needs_backward=walk.needs_backward, call=walk.call)
            refuse_one_value(moments.count, count_per_channel(x), x.shape)
            if walk.refuses_nonfinite:
                refuse_nonfinite(local, moments, walk.group)
        rstd = inverse_std(moments, walk.eps)
        if walk.renorm is not None and not correction:
            correction = _correction(moments, rstd, walk, running, recomputing=recomputing)
    return moments, rstd, correction


def _first_derivative(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    side: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor | float,
    walk: Walk,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of the input, of the residual (None where it is ``grad``), of bias and of weight."""
    needs_x, *_, needs_residual, _, _ = needs
    if walk.is_plain and needs_x and x.numel():
        whole = whole_backward(grad, x, weight, bias, side, mean, rstd, count, walk, needs_residual)
        if whole is not None:
            return whole
    dx_or_none, dresidual, sums, _ = batch_backward(
        grad, x, weight, bias, side, mean, rstd, count, walk, needs_x, needs_residual
    )
    dbias, dweight = sums.unbind()
    return dx_or_none, dresidual, dbias, dweight


def _before_activation(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    side: Tensor | None,
    effective: Tensor | None,
    shift: Tensor | None,
    rstd: Tensor,
    walk: Walk,
) -> Tensor:
    """The gradient behind the activation, itself differentiable."""
    assert walk.activation is not None and walk.known is not None
    if not x.numel():
        return grad
    if not walk.activation.is_piecewise_linear:
        plain = walk._replace(activation=None)
        pre = apply_function(_Normalize, x, weight, bias, None, plain, None)[0]
        return walk.activation.backward(grad, pre if side is None else pre + side)
    with torch.no_grad():  # the slope is constant: what a gradient of ones becomes
        flat, mean = flatten(x), walk.known[0].mean
        slopes = choose(walk.backend, x).batch_backward_input(
            torch.ones_like(flat), flat, mean, rstd, effective, torch.zeros_like(mean).expand(2, -1), shift,
            walk.activation, side, True,
        )[1]  # fmt: skip
    assert slopes is not None
    return grad * unflatten(slopes, x.shape)


def _from_output(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    walk: Walk,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments under which the primitives find x̂ in the output: with z = act⁻¹(y), x̂ = (z - β)·(1/γ).

    Reference: Rota Bulò, Porzi & Kontschieder (2018), arXiv:1712.02616, section 3.
    """
    if differentiable:
        raise SyncNormError(
            "memory_efficient=True keeps the output in place of the input, and there is no second derivative without the "
            "input. Use memory_efficient=False where create_graph=True is needed."
        )
    if walk.activation is not None:
        # y has the sign of what it was made from.
        grad, y = walk.activation.backward(grad, y), walk.activation.inverse(y)
    gamma = torch.ones_like(rstd) if weight is None else weight.double()
    mean = torch.zeros_like(rstd) if bias is None else bias.double()
    return grad, y, rstd * gamma.square(), mean, gamma.reciprocal()


def _correction(
    moments: Moments, rstd: Tensor, walk: Walk, running: RunningStatistics | None, *, recomputing: bool
) -> tuple[Tensor, Tensor]:
    """The correction towards the running statistics as they are before this batch moves them."""
    assert walk.renorm is not None and running is not None and running.mean is not None and running.var is not None
    if recomputing:
        raise SyncNormError(
            "batch renormalisation is recomputed within a checkpointed region that is not recognised (a nested one, or not "
            "torch.utils.checkpoint's), and its running statistics have moved since. Checkpoint it in a region of its own."
        )
    return renorm_correction(moments, rstd, running.mean, running.var, walk.eps, walk.renorm)
