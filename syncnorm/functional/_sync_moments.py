"""Mean and variance over all ranks as differentiable values, for norms that mix them with others before they normalise.

Batch normalisation itself has a walk of its own, which never forms these gradients. Here the ranks meet once forward and
once backward, too, and the backward is differentiable as often as one likes.
"""

# N batch, C channels, S flattened space

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.layout import accumulate_dtype, count_per_channel, flatten
from syncnorm.core.moments import Moments, at_least_one
from syncnorm.core.running import RunningStatistics, update_running
from syncnorm.distributed.exchange import exchange_moments, exchange_sums
from syncnorm.distributed.groups import LOCAL, Group
from syncnorm.distributed.ledger import Call, begin_call
from syncnorm.functional._checkpoint import (
    is_recomputing,
    recall_call,
    remember_call,
    unseen_by_selective_checkpointing,
)
from syncnorm.functional._nonfinite import refuse_nonfinite
from syncnorm.functional._one_value import ONE_VALUE, refuse_one_value
from syncnorm.functional._samples import beside, instance_moments
from syncnorm.functional._sync_batch_norm import needs_grad, tell_others
from syncnorm.functional._walk import moments_of_none, tells
from syncnorm.kernels import choose

__all__ = ["SampleAndBatch", "sample_and_batch_moments", "sync_moments"]


def sync_moments(
    x: Tensor,
    group: Group,
    *,
    within: Tensor | None = None,
    size: int = 1,
    weights: Tensor | None = None,
    running: RunningStatistics | None = None,
    site: object = None,
    refuse_one_value: bool = False,
    refuses_nonfinite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over everything but channels and over all ranks, with their gradients.

    With M the number of values on all ranks and ∂μ, ∂σ² summed over ranks, dx = (∂μ + 2(x - μ)∂σ²)/M. One all-reduce
    forward, of the moments, and one backward, of the two cotangents; none in a group of one.

    ``x`` may also hold the means of equal parts, of ``size`` values each and with the variances ``within``: the result is
    that of all their values. A norm that has the moments of each sample already need not read its input again.

    With ``weights`` w each value counts w times: μ = Σw·x/Σw, and a value of weight 0 is not there.

    Args:
        x: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        group: The ranks that meet; each of them must make this call.
        within: Variance within each part, like ``x``; None if ``x`` holds single values.
        size: Values per part.
        weights: How often each value counts, ``[N, 1, *]``, nonnegative and without gradient; None for once.
        running: Moved towards the result, in place, once per batch (not by a checkpointed recompute).
        site: Identity of the layer, by which a checkpointed recompute finds its forward.
        refuse_one_value: Whether a single value per channel on all ranks together is an error.
        refuses_nonfinite: Whether moments that are not finite are an error.

    Returns:
        μ and σ², float64 ``[C]``, the same bits on all ranks; zeros if all shards are empty.

    Raises:
        ValueError: On every rank, for a single value with ``refuse_one_value``; nothing has been changed then.
        SyncNormMismatch: If ranks disagree on the backward to come, or another rank refused its input.
    """
    call = None if torch.compiler.is_compiling() else begin_call(site, group, x)
    walk = _Walk(group, size, needs_grad(x, within), site, refuse_one_value, refuses_nonfinite, call)
    if not torch.compiler.is_compiling():
        mean, var, _ = _SyncMoments.apply(x, within, weights, walk, running)  # type: ignore[no-untyped-call]
        return mean, var
    mean, var, count = _SyncMoments.apply(x, within, weights, walk, None)  # type: ignore[no-untyped-call]
    if refuse_one_value and count_per_channel(x) * size <= 1 and isinstance(count, Tensor):
        torch._assert_async(count != 1, ONE_VALUE)
    if running is not None:
        update_running(running, Moments(count.detach(), mean.detach(), (var * count).detach()))
    return mean, var


class SampleAndBatch(NamedTuple):
    """Moments of each sample ``[N, C]`` and of the batch ``[C]``, in one dtype."""

    sample_mean: Tensor
    sample_var: Tensor
    mean: Tensor
    var: Tensor


def sample_and_batch_moments(
    input: Tensor,
    running: RunningStatistics,
    *,
    training: bool,
    group: Group,
    site: object = None,
    refuse_one_value: bool = False,
) -> SampleAndBatch:
    """Moments of each sample and, merged from them, of all ranks' batch; the input is read once.

    In evaluation the batch's are the running ones; where none are kept, those of this rank's batch.

    Args:
        input: ``[N, C, *]``.
        running: Moved when training.
        training: Whether the ranks meet.
        group: The ranks that meet.
        site: As in :func:`sync_moments`.
        refuse_one_value: As in :func:`sync_moments`.
    """
    try:
        sample_mean, sample_var = instance_moments(input)
    except RuntimeError:
        if training:
            tell_others(input, group, site=site)
        raise
    if not training and running.mean is not None and running.var is not None:
        mean, var = running.mean, running.var
    else:
        mean, var = sync_moments(
            sample_mean,
            group if training else LOCAL,
            within=sample_var,
            size=input.shape[2:].numel(),
            running=running if training else None,
            site=site,
            refuse_one_value=refuse_one_value and training,
        )
    return SampleAndBatch(sample_mean, sample_var, mean.to(sample_mean.dtype), var.to(sample_mean.dtype))


class _Walk(NamedTuple):
    group: Group
    size: int
    needs_backward: bool
    site: object
    refuse_one_value: bool
    refuses_nonfinite: bool = False
    call: Call | None = None


class _SyncMoments(Function):
    @staticmethod
    @tells("forward", lambda *arguments: arguments[3])
    def forward(
        x: Tensor,
        within: Tensor | None,
        weights: Tensor | None,
        walk: _Walk,
        running: RunningStatistics | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        recomputing = is_recomputing()
        with unseen_by_selective_checkpointing():
            moments, _ = (recall_call(walk.site, walk.call) if recomputing else None) or (None, ())
            if moments is None:
                local = _local_moments(x, within, weights, walk)
                moments = exchange_moments(local, walk.group, needs_backward=walk.needs_backward, call=walk.call)
                if walk.refuse_one_value:
                    refuse_one_value(moments.count, local.count)
                if walk.refuses_nonfinite:
                    refuse_nonfinite(local, moments, walk.group)
            if not recomputing and not torch.compiler.is_compiling():
                remember_call(walk.site, walk.call, (moments, ()))
                if running is not None:
                    update_running(running, moments)
            count = moments.count
            if not isinstance(count, Tensor):
                count = moments.mean.new_full((), count)
            # Copies: a record that a checkpoint keeps must not be an output of this graph.
            return moments.mean.clone(), moments.var, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, within, weights, ctx.walk, _ = inputs
        mean, _, count = output
        ctx.mark_non_differentiable(count)
        ctx.within_dtype = None if within is None else within.dtype
        ctx.save_for_backward(x, mean, count, weights)

    @staticmethod
    @tells("backward", lambda ctx, *_: ctx.walk)
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Differentiable operations only, and the saved mean leads back into this very node: its own derivative, and the
        # next one, follow of themselves.
        x, mean, count, weights = ctx.saved_tensors
        walk: _Walk = ctx.walk
        sums = _sum_over_ranks(torch.stack([grad_mean, grad_var]), walk.group, walk.call)
        scaled = (sums * (walk.size / at_least_one(count))).to(accumulate_dtype(x.dtype))
        to_mean, to_var = (beside(row, x) for row in scaled.unbind(0))
        centred = x.to(scaled.dtype) - beside(mean.to(scaled.dtype), x)
        dx = to_mean + 2 * to_var * centred
        dx = (dx if weights is None else dx * weights.to(scaled.dtype)).to(x.dtype)
        dwithin = None if ctx.within_dtype is None else to_var.expand_as(x).to(ctx.within_dtype)
        return dx, dwithin, None, None, None


class _AllReduce(Function):
    """The sum over ranks of a tensor that differs between them. Its derivative is the same sum of the cotangents."""

    @staticmethod
    def forward(row: Tensor, group: Group, call: Call | None) -> Tensor:
        return exchange_sums(row, group, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_over_ranks(grad, ctx.group, ctx.call), None, None


def _sum_over_ranks(row: Tensor, group: Group, call: Call | None) -> Tensor:
    if group.size == 1:
        return row
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        total: Tensor = _AllReduce.apply(row, group, call)  # type: ignore[no-untyped-call]
        return total
    return exchange_sums(row, group, call)


def _local_moments(x: Tensor, within: Tensor | None, weights: Tensor | None, walk: _Walk) -> Moments:
    if not x.numel() or not walk.size:
        return moments_of_none(x)
    if weights is not None:
        return _weighted_moments(x, weights)
    count, mean, m2 = choose("auto", x).batch_moments(flatten(x))
    if within is not None:
        m2 = m2 + within.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
    return Moments(count * walk.size, mean, m2 * walk.size)


def _weighted_moments(x: Tensor, weights: Tensor) -> Moments:
    w = weights.double()
    dims = [d for d in range(x.dim()) if d != 1]
    count = w.sum()
    # A value of weight 0 may be anything, also NaN: padding is often left as it was.
    values = torch.where(w > 0, x.double(), 0.0)
    mean = (values * w).sum(dims) / count.clamp(min=torch.finfo(torch.float64).tiny)
    m2 = (w * (values - beside(mean, x)).square()).sum(dims)
    known = count if torch.compiler.is_compiling() or count.device.type != "cpu" or type(count) is not Tensor else None
    return Moments(float(count.numpy()) if known is None else known, mean, m2)
