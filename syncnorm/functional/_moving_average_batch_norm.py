"""Moving average batch normalisation: statistics of the last batches in both directions, each met over the ranks of a group.

Its backward is the method, not the derivative of its forward: what batch norm takes from one batch, the gradient takes
from the last m, too.
"""

# C channels; flat tensors are [N, C, S] or [M, C]

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.layout import flatten, flatten_like, unflatten
from syncnorm.core.moments import Moments, at_least_one
from syncnorm.core.moving_average import MovingAverages, average, keep, moved, renorm_scales
from syncnorm.core.running import RunningStatistics, update_running
from syncnorm.distributed.exchange import exchange_means, exchange_moments
from syncnorm.distributed.ledger import begin_call
from syncnorm.errors import SyncNormError
from syncnorm.functional._checkpoint import (
    is_recomputing,
    recall_call,
    remember_call,
    unseen_by_selective_checkpointing,
)
from syncnorm.functional._sync_batch_norm import enter, evaluate, needs_grad, validate
from syncnorm.functional._walk import Walk, apply_function, empty_after, moments_of_none, tells
from syncnorm.kernels import choose

__all__ = ["moving_average_batch_norm"]

# What a γ of 0 counts as where the gradient is divided by it and multiplied again: it adds 1e-20·dy to dx.
_TINY = 1e-20


def moving_average_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    averages: MovingAverages,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.02,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    track: bool = True,
    group: object = "world",
    backend: str = "auto",
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
) -> Tensor:
    """Compute y = γ·r·z + β with z = (x - c)/√(χ̄² + ε), without centring, by the statistics of the last m batches.

        χ² = ⟨(x - c)²⟩ over all ranks,   χ̄² = its mean over the last m batches
        r = clip(√(χ̄² + ε) / √(running_var + ε), 1/r_max, r_max), and 1 during the warm-up

    The backward is given, not derived. With g = γ·r·dy, ψ = ⟨g·z⟩ over all ranks and ψ̄ its mean over the last m backward
    passes, dx = (g - z·ψ̄)/√(χ̄² + ε). With m = 1 this is the derivative at constant r; otherwise it is not, and there is no
    second one. γ and β get their derivatives. One exchange forward and one backward.

    c is ``running_mean``, a constant that no batch moves: 0 is the paper. ``running_var`` is the running average of χ², the
    mean square about c, so that evaluation is batch norm's, γ·(x - c)/√(running_var + ε) + β, and can be folded likewise. The
    authors' code moves it by χ̄² and leaves moving averages out of the warm-up altogether; here r alone waits.

    A single value in the whole group has a mean square, so it is no error, as it is for batch norm.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        running_mean: c, ``[C]``; not changed.
        running_var: ``[C]``; updated in place when training, after r was taken.
        averages: The windows of χ² and ψ, moved in place by each training forward and by each backward through one, unless
            the global batch is empty; and the limits of r.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        training: Use the batch; otherwise evaluation, as batch norm.
        momentum: Weight of the new batch in ``running_var``; None for the cumulative average.
        eps: ε.
        num_batches_tracked: int64 scalar, counted up in place; what the warm-up is counted by.
        track: Whether this batch moves the running statistics and the windows.
        group: As in :func:`sync_batch_norm`.
        backend: As in :func:`sync_batch_norm`.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``.

    Raises:
        ValueError: If the input does not fit, or eps is not positive.
        TypeError: If the input is not floating point.
        SyncNormError: As :func:`sync_batch_norm`; if it is recomputed in a checkpointed region that is not recognised; or if
            its gradient is differentiated.

    Reference: Yan, Wan, Zhang, Zhang, Wei & Sun (2020), arXiv:2001.06838, section 4.
    """
    if not training:
        validate(input, running_mean.numel(), input_dims)
        return evaluate(input, running_mean, running_var, weight, bias, eps)
    ranks = enter(input, eps, group, running_mean.numel(), input_dims, site, backend)
    met = begin_call(site, ranks, input)
    walk = Walk(eps, ranks, backend, needs_grad(input, weight, bias), site, call=met)
    state = _State(averages, RunningStatistics(running_mean, running_var, num_batches_tracked, momentum, tracked=track))
    if not torch.compiler.is_compiling():
        # Inside, because there torch.func's wrappers are off and buffers may be written in place.
        y: Tensor = apply_function(_Normalize, input, weight, bias, walk, state)[0]
        return y
    y, *_, count, later = _Normalize.apply(input, weight, bias, walk, state)  # type: ignore[no-untyped-call]
    _move(state, count, later)
    return y


class _State(NamedTuple):
    averages: MovingAverages
    running: RunningStatistics


class _Normalize(Function):
    @staticmethod
    @tells("forward", lambda *arguments: arguments[3])
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, walk: Walk, state: _State) -> tuple[Any, ...]:
        recomputing = is_recomputing()
        flat = flatten(x) if x.numel() else x
        with unseen_by_selective_checkpointing():
            record, later = recall_call(walk.site, walk.call) if recomputing else None, None
            if record is None:
                if recomputing:
                    raise SyncNormError(
                        "moving average batch normalisation is recomputed within a checkpointed region that is not recognised "
                        "(a nested one, or not torch.utils.checkpoint's), and its averages have moved since. Checkpoint it in "
                        "a region of its own."
                    )
                record, later = _statistics(x, flat, walk, state)
                if not torch.compiler.is_compiling():
                    remember_call(walk.site, walk.call, record)
                    _move(state, record[-1], later)
        centre, rstd, r, count = record
        if x.numel():
            y = choose(walk.backend, x).batch_normalize(flat, centre, rstd * r, weight, bias)[0]
            y = unflatten(y, x.shape)
            # The same memory but no view, for the ReLU(inplace=True) that often follows; Inductor makes no copy of this one.
            y = y.clone() if torch.compiler.is_compiling() else y.data
        else:
            y = empty_after(rstd, x)
        if torch.compiler.is_compiling() and not isinstance(count, Tensor):
            count = rstd.new_full((), count)  # Dynamo asks every output for a gradient that is a tensor
        return y, centre, rstd, r, count, later

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, ctx.walk, ctx.state = inputs
        _, centre, rstd, r, count, _ = output
        ctx.mark_non_differentiable(*(t for t in output[1:] if isinstance(t, Tensor)))
        ctx.set_materialize_grads(False)
        count_tensor, ctx.count = (count, None) if isinstance(count, Tensor) else (None, count)
        ctx.save_for_backward(x, weight, centre, rstd, r, count_tensor)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @tells("backward", lambda ctx, *_: ctx.walk)
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, centre, rstd, r, count = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad
        arguments = (grad, x, weight, centre, rstd, r, ctx.count if count is None else count, ctx.walk, ctx.state)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = apply_function(_Gradient, *arguments)  # create_graph=True
        else:
            gradients = _Gradient.forward(*arguments)
        dtypes = (x.dtype, None if weight is None else weight.dtype, ctx.bias_dtype)
        needed = zip(gradients, dtypes, ctx.needs_input_grad[:3], strict=True)
        return *(part.to(dtype) if wanted else None for part, dtype, wanted in needed), None, None


def _statistics(x: Tensor, flat: Tensor, walk: Walk, state: _State) -> tuple[tuple[Any, ...], Tensor]:
    """c, 1/√(χ̄² + ε), r and the count of this batch; and the window of χ² with it. Nothing is moved yet."""
    averages, running = state
    assert running.mean is not None and running.var is not None
    local = choose(walk.backend, x).batch_moments(flat) if x.numel() else moments_of_none(x)
    moments = exchange_moments(local, walk.group, needs_backward=walk.needs_backward, call=walk.call)
    # A copy: DDP writes to the buffers at the next forward, which may come before this one's backward.
    centre = running.mean.to(torch.float64, copy=True)
    later = moved(averages.squares, moments.var + (moments.mean - centre).square())
    rstd, r = renorm_scales(average(later), running.var, walk.eps, running.num_batches_tracked, averages)
    return (centre, rstd, r, moments.count), later


def _move(state: _State, count: Tensor | float, later: Tensor) -> None:
    """Let one batch into the window and the running statistics."""
    averages, running = state
    if not running.tracked:
        return
    keep(averages.squares, later, count)
    square, nobodys_mean = later[-1, :-1], torch.zeros_like(later[-1, :-1])
    # The mean square about a constant has lost no degree of freedom to an estimated mean: counted as one more, what this
    # has as its unbiased variance is χ² itself, and a single value is enough.
    update_running(running._replace(mean=nobodys_mean), Moments(count + 1, nobodys_mean, square * count))


class _Gradient(Function):
    """The backward as a function of its own: whoever differentiates it is told that it has no derivative.

    ``once_differentiable`` would not: its error hangs on no input, and ``autograd.grad`` walks around it.
    """

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        centre: Tensor,
        rstd: Tensor,
        r: Tensor,
        count: Tensor | float,
        walk: Walk,
        state: _State,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, and this rank's dγ and dβ; ψ moves its window."""
        window = state.averages.slopes
        if x.numel():
            backend, flat = choose(walk.backend, x), flatten(x)
            grad = flatten_like(grad, flat)
            dbias, products = backend.batch_backward_reduce(grad, flat, centre, rstd).unbind(0)
        else:
            # Of x, too: see moments_of_none.
            dbias = products = (grad * x).transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
        scale = r if weight is None else r * weight
        slope = scale * exchange_means(products, at_least_one(count), walk.group, walk.call)
        later = moved(window, slope)
        over_batches = average(later)
        if state.running.tracked:
            keep(window, later, count)
        if not x.numel():
            return empty_after(over_batches, x), products * r, dbias
        # The primitive wants ψ̄ before γ·r, of which earlier batches may have had another.
        scale = torch.where(scale.abs() < _TINY, _TINY, scale)
        means = torch.stack([torch.zeros_like(slope), over_batches / scale])
        dx = backend.batch_backward_input(grad, flat, centre, rstd, scale, means)[0]
        return unflatten(dx, x.shape), products * r, dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise SyncNormError(
            "the gradient of moving average batch normalisation is made from the last batches and is no derivative, so it has "
            "none itself. For a gradient penalty, use batch norm (syncnorm.convert(model))."
        )
