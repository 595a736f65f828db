"""EvoNorm-B0: a normalisation and an activation that were searched for together, with the variance of all ranks' batch."""

# N batch, C channels

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional._samples import are_rows, beside, sample_rows
from syncnorm.functional._sync_batch_norm import enter, validate
from syncnorm.functional._sync_moments import sample_and_batch_moments
from syncnorm.functional._walk import apply_function
from syncnorm.kernels import choose

__all__ = ["evo_norm_b0"]


def evo_norm_b0(
    input: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-3,
    *,
    num_batches_tracked: Tensor | None = None,
    track: bool = True,
    group: object = "world",
    num_features: int | None = None,
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
) -> Tensor:
    """Compute ``y = x / max(√(σ²_batch + eps), v·x + √(σ²_sample + eps)) · γ + β``.

    σ²_batch is the variance of a channel over the batch of all ranks and space, σ²_sample that of one sample over space,
    both biased; x is not centred. The maximum makes it an activation, too. One all-reduce forward and one backward; none in
    evaluation, where the running variance takes the place of the batch's.

    A map of one value has σ²_sample = 0, and one value in the whole group σ²_batch = 0, both with finite gradients; the
    latter moves no running variance, as it says nothing of the unbiased one.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        v: Slope in the denominator, ``[C]``.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        running_var: Unbiased variance over the global count, ``[C]`` or None; updated in place when training. Without it
            evaluation uses the batch of this rank.
        training: Use the batch and update the running variance.
        momentum: Weight of the new batch in the running variance; None for the cumulative average.
        eps: Added to the variances.
        num_batches_tracked: int64 scalar, counted up in place.
        track: Whether this batch moves the running variance.
        group: As in :func:`sync_batch_norm`.
        num_features: Channels that ``input`` must have; by default as many as ``v``.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``; computed in at least float32.

    Raises:
        ValueError: If the input does not fit, or eps is not positive when training.
        TypeError: If the input is not floating point.
        SyncNormError: As :func:`sync_batch_norm`.
        SyncNormMismatch: As :func:`sync_batch_norm`.

    Reference: Liu, Brock, Simonyan & Le (2020), arXiv:2004.02967, table 1, EvoNorm-B0.
    """
    num_features = v.numel() if num_features is None else num_features
    if training:
        ranks = enter(input, eps, group, num_features, input_dims)
    else:
        validate(input, num_features, input_dims)
        ranks = LOCAL
    unused_mean = None if running_var is None else torch.zeros_like(running_var)
    running = RunningStatistics(unused_mean, running_var, num_batches_tracked, momentum, tracked=track)
    moments = sample_and_batch_moments(input, running, training=training, group=ranks, site=site)
    of_batch, of_sample = (torch.sqrt(var + eps) for var in (moments.var, moments.sample_var))
    if are_rows(input):
        y: Tensor = apply_function(_Activate, input, v, of_batch, of_sample, weight, bias)
        return y
    return _formula(input, v, of_batch, of_sample, weight, bias)


def _formula(
    x: Tensor, v: Tensor, of_batch: Tensor, of_sample: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    wide = x.to(of_sample.dtype)
    y = wide / torch.maximum(beside(of_batch, x), wide * beside(v, x) + beside(of_sample, x))
    y = y if weight is None else y * beside(weight, x)
    return (y if bias is None else y + beside(bias, x)).to(x.dtype)


class _Activate(Function):
    """:func:`_formula` with a backward of a dozen passes in place of three dozen, which keeps nothing but its input."""

    @staticmethod
    def forward(*tensors: Tensor | None) -> Tensor:
        return _formula(*tensors)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            # Aliases, as one may be a function of another: the standard deviations are of x.
            tensors = [None if t is None else t.view_as(t) for t in tensors]
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(_formula(*tensors), wanted, grad, create_graph=True))
            return tuple(next(found) if need else None for need in needed)
        input, v, of_batch, of_sample, weight, _ = tensors
        x, g = (t.to(of_sample.dtype).contiguous() for t in (input, grad))
        vector, floor = beside(v.to(x.dtype), x), beside(of_batch, x)
        slope = torch.addcmul(beside(of_sample, x), x, vector)
        above = (slope - floor).sign_()  # at 0 each side has half of the gradient, as torch.maximum gives it
        divisor = torch.maximum(slope, floor, out=slope)
        ratio, g_over = x / divisor, g / divisor
        dbias, dweight = _sums(g, ratio)  # of g and of g·x/d
        product = ratio.mul_(g_over)  # g·x/d²; -γ of it is the gradient of the divisor
        dfloor = product.sum(list(range(2, x.dim())))
        twice = torch.addcmul(product, product, above, out=above)
        dsample, dv = (total / -2 for total in _sums(twice, x))
        dfloor = -dfloor - dsample
        if weight is not None:
            gamma = weight.to(x.dtype)
            g_over, dsample, dv, dfloor = g_over.mul_(beside(gamma, x)), dsample * gamma, dv * gamma, dfloor * gamma
            vector = vector * beside(gamma, x)
        dx = g_over.addcmul_(twice, vector, value=-0.5)
        vectors = (dv.sum(0), dfloor.sum(0), dsample, dweight.sum(0), dbias.sum(0))
        return tuple(
            None if t is None or not need else d.to(t.dtype)
            for t, need, d in zip(tensors, needed, (dx, *vectors), strict=True)
        )


def _sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σg and Σg·x over space, ``[N, C]``."""
    rows = sample_rows(x)
    zeros = torch.zeros(rows.size(1), dtype=torch.float64, device=x.device)
    sums = choose("auto", rows).batch_backward_reduce(sample_rows(g), rows, zeros, torch.ones_like(zeros))
    first, second = sums.view(2, *x.shape[:2]).to(x.dtype).unbind(0)
    return first, second
