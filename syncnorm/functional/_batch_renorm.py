"""Batch renormalisation over the ranks of a group: batch norm whose output is pulled towards what evaluation would give."""

from torch import Tensor

from syncnorm.core.renorm import RenormLimits
from syncnorm.core.running import RunningStatistics
from syncnorm.functional._batch_normalize import batch_normalize
from syncnorm.functional._sync_batch_norm import enter, evaluate, needs_grad, validate
from syncnorm.functional._walk import Walk

__all__ = ["batch_renorm"]


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    limits: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-3,
    *,
    num_batches_tracked: Tensor | None = None,
    track: bool = True,
    group: object = "world",
    backend: str = "auto",
    clip_rate: Tensor | None = None,
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
) -> Tensor:
    """Compute y = γ(x̂·r + d) + β, with r and d the clipped distance of the batch's statistics from the running ones.

        r = clip(σ_B / σ, 1/r_max, r_max),   d = clip((μ_B - μ) / σ, -d_max, d_max)

    μ_B and σ_B are of all ranks of the group; σ = √(running_var + ε) on both sides, so that the unclipped output is exactly
    what evaluation gives with the statistics before this batch. r and d are constants to the gradient. r_max = 1, d_max = 0
    is batch normalisation. The same exchanges as :func:`sync_batch_norm`: one forward, one backward.

    The paper keeps a running *standard deviation*; this keeps the unbiased running variance that every BatchNorm checkpoint
    has, and takes its root.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        running_mean: ``[C]``; updated in place when training, after r and d were taken.
        running_var: Unbiased variance over the global count, ``[C]``.
        limits: r_max ≥ 1 and d_max ≥ 0, float64 ``[2]``; a tensor, so that a schedule moves them without recompilation.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        training: Use the batch; otherwise evaluation, as batch norm.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        eps: ε.
        num_batches_tracked: int64 scalar, counted up in place.
        track: Whether this batch moves the running statistics.
        group: As in :func:`sync_batch_norm`.
        backend: As in :func:`sync_batch_norm`.
        clip_rate: float64 ``[2]``, written in place: shares of channels whose r and d were clipped.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``.

    Raises:
        ValueError: As :func:`sync_batch_norm`.
        TypeError: As :func:`sync_batch_norm`.
        SyncNormError: As :func:`sync_batch_norm`; or if it is recomputed in a checkpointed region that is not recognised.

    Reference: Ioffe (2017), arXiv:1702.03275, algorithm 1.
    """
    if not training:
        validate(input, running_mean.numel(), input_dims)
        return evaluate(input, running_mean, running_var, weight, bias, eps)
    ranks = enter(input, eps, group, running_mean.numel(), input_dims, site, backend)
    running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum, tracked=track)
    walk = Walk(eps, ranks, backend, needs_grad(input, weight, bias), site, RenormLimits(limits, clip_rate))
    return batch_normalize(input, weight, bias, walk, running)
