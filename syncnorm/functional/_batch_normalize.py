"""The walk of synchronised batch normalisation as a differentiable function, once and twice.

Local moments, ranks meet, normalise; and back: local sums, ranks meet, input gradient. The backward exchange does not
depend on what needs a gradient on this rank, so ranks that differ there still meet.
"""

# C channels; flat tensors are [N, C, S] or [M, C]

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.backward import double_backward_input, double_backward_sums
from syncnorm.core.layout import accumulate_dtype, channel_view, count_per_channel, flatten, flatten_like, unflatten
from syncnorm.core.moments import Moments, at_least_one, empty_moments
from syncnorm.core.renorm import RenormLimits, correct_affine, renorm_correction
from syncnorm.core.running import RunningStatistics, update_running
from syncnorm.distributed.exchange import exchange_moments, exchange_sums
from syncnorm.distributed.groups import Group
from syncnorm.errors import SyncNormError
from syncnorm.functional._checkpoint import is_recomputing, recall, remember, unseen_by_selective_checkpointing
from syncnorm.functional._one_value import ONE_VALUE, refuse_one_value
from syncnorm.kernels import choose

__all__ = ["Walk", "batch_normalize", "batch_normalize_and_moments"]


class Walk(NamedTuple):
    """What one call needs beside its tensors.

    Attributes:
        eps: Added to the variance.
        group: The ranks that meet.
        backend: Name of a kernel backend, or ``"auto"``.
        needs_backward: Whether a backward follows on this rank.
        site: Identity of the layer, by which a checkpointed recompute finds its forward.
        renorm: Limits of batch renormalisation; None for plain batch normalisation.
    """

    eps: float
    group: Group
    backend: str
    needs_backward: bool
    site: object = None
    renorm: RenormLimits | None = None


def batch_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, walk: Walk, running: RunningStatistics | None
) -> Tensor:
    """Normalise ``x`` [N, C, *] by the moments of all ranks and move the running statistics, in place.

    Raises:
        ValueError: On every rank, if the group holds one value per channel in all; nothing has been changed then.
        SyncNormMismatch: If ranks disagree, see :func:`syncnorm.distributed.exchange.exchange_moments`.
    """
    return batch_normalize_and_moments(x, weight, bias, walk, running)[0]


def batch_normalize_and_moments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, walk: Walk, running: RunningStatistics | None
) -> tuple[Tensor, Moments]:
    """:func:`batch_normalize`, and the moments that it normalised by, which carry no gradient."""
    if not torch.compiler.is_compiling():
        # Inside, because there torch.func's wrappers are off and buffers may be written in place.
        y, mean, m2, _, count, *_ = _apply(_Normalize, x, weight, bias, walk, running)
        return y, Moments(count, mean, m2)
    y, mean, m2, _, count, *_ = _Normalize.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, walk, None if walk.renorm is None else running
    )
    if count_per_channel(x) <= 1 and isinstance(count, Tensor):
        torch._assert_async(count != 1, ONE_VALUE)
    if running is not None:
        update_running(running, Moments(count, mean, m2))
    return y, Moments(count, mean, m2)


class _Normalize(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, walk: Walk, running: RunningStatistics | None
    ) -> tuple[Any, ...]:
        recomputing = is_recomputing()
        flat = flatten(x) if x.numel() else x
        with unseen_by_selective_checkpointing():
            moments, correction = (recall(walk.site) if recomputing else None) or (None, ())
            if moments is None:
                local = choose(walk.backend, x).batch_moments(flat) if x.numel() else empty_moments(x.size(1), x.device)
                moments = exchange_moments(local, walk.group, needs_backward=walk.needs_backward)
                refuse_one_value(moments.count, count_per_channel(x), x.shape)
            rstd = moments.var.add_(walk.eps).rsqrt_()
            if walk.renorm is not None:
                if not correction:
                    correction = _correction(moments, rstd, walk, running, recomputing=recomputing)
                weight, bias = correct_affine(weight, bias, correction, x.dtype)
            if not recomputing and not torch.compiler.is_compiling():
                remember(walk.site, (moments, correction))
        if x.numel():
            backend = choose(walk.backend, x)
            y = unflatten(backend.batch_normalize(flat, moments.mean, rstd, weight, bias), x.shape)
            # The same memory but no view, for the ReLU(inplace=True) that often follows; Inductor makes no copy of this one.
            y = y.clone() if torch.compiler.is_compiling() else y.data
        else:
            y = _empty_after(rstd, x)
        if running is not None and not recomputing and not torch.compiler.is_compiling():
            with unseen_by_selective_checkpointing():
                update_running(running, moments)
        count = moments.count
        if torch.compiler.is_compiling() and not isinstance(count, Tensor):
            count = rstd.new_full((), count)  # Dynamo asks every output for a gradient that is a tensor
        return y, moments.mean, moments.m2, rstd, count, *correction

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, walk, _ = inputs
        _, mean, _, rstd, count, *correction = output
        ctx.mark_non_differentiable(*(t for t in output[1:] if isinstance(t, Tensor)))
        ctx.set_materialize_grads(False)
        count_tensor, ctx.count = (count, None) if isinstance(count, Tensor) else (None, count)
        ctx.save_for_backward(x, weight, mean, rstd, count_tensor, *correction)
        ctx.walk, ctx.bias_dtype = walk, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count, *correction = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(x)
        if count is None:
            count = ctx.count
        effective = correct_affine(weight, None, correction, x.dtype)[0] if correction else weight
        arguments = (grad, x, effective, mean, rstd, count, ctx.walk, ctx.needs_input_grad[0])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dweight, dbias = _apply(_Backward, *arguments)[:3]  # create_graph=True
        else:
            dx, dweight, dbias = _Backward.forward(*arguments)[:3]
        if correction:
            dweight = dweight * correction[0] + dbias * correction[1]
        return (
            dx,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class _Backward(Function):
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
        if not x.numel():
            zero = grad.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
            sums = torch.stack([zero, zero])
            means = exchange_sums(sums.clone(), walk.group) / at_least_one(count)
            return _empty_after(means[0], x), sums[1], sums[0], means
        backend, flat = choose(walk.backend, x), flatten(x)
        grad = flatten_like(grad, flat)
        sums = backend.batch_backward_reduce(grad, flat, mean, rstd)
        # The exchange may reuse its memory, and the local sums are dγ and dβ.
        means = exchange_sums(sums.clone() if walk.group.size > 1 else sums, walk.group) / count
        dx = None
        if needs_input_grad:
            dx = unflatten(backend.batch_backward_input(grad, flat, mean, rstd, weight, means), x.shape)
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
    def backward(ctx: Any, v: Tensor | None, a: Tensor, b: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _Backward._second(ctx, v, a, b)
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
        sums = exchange_sums(double_backward_sums(v_flat, a, g_flat, x_hat), ctx.walk.group)
        all_means = torch.cat([means, sums / at_least_one(count)]).to(accumulate)
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


def _empty_after(vector: Tensor, x: Tensor) -> Tensor:
    # Formed from the vector and not just empty: torch.compile drops an exchange that no result depends on, and puts one
    # that does not depend on the gradient into the forward graph; either way the other ranks would wait for this one.
    return x * vector.to(x.dtype).view(x.size(1), *[1] * (x.dim() - 2))


def _apply(function: type[Function], *arguments: Any) -> Any:
    # Function.apply inspects the signature of forward at every call, 35 µs here; only torch.func's transforms need that.
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]
