"""EvoNorm-B0: a normalisation and an activation that were searched for together, with the variance of all ranks' batch."""

# N batch, C channels

import torch
from torch import Tensor

from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional._sync_batch_norm import enter, validate
from syncnorm.functional._sync_moments import beside, sample_and_batch_moments

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
    x = input.to(moments.sample_var.dtype)
    of_batch, of_sample = (beside(torch.sqrt(var + eps), x) for var in (moments.var, moments.sample_var))
    y = x / torch.maximum(of_batch, x * beside(v, x) + of_sample)
    if weight is not None:
        y = y * beside(weight, x)
    if bias is not None:
        y = y + beside(bias, x)
    return y.to(input.dtype)
