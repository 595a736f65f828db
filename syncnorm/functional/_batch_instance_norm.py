"""Batch-instance norm: per channel, a learned share of batch norm over all ranks and of instance norm."""

# N batch, C channels

import torch
from torch import Tensor

from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional._samples import normalize_samples
from syncnorm.functional._sync_batch_norm import enter, validate
from syncnorm.functional._sync_moments import sample_and_batch_moments

__all__ = ["batch_instance_norm"]


def batch_instance_norm(
    input: Tensor,
    rho: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    track: bool = True,
    group: object = "world",
    num_features: int | None = None,
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
) -> Tensor:
    """Compute ``y = (ρ·x̂_batch + (1 - ρ)·x̂_instance)·γ + β`` with ρ held within [0, 1].

    x̂_batch is normalised over the batch of all ranks, or in evaluation by the running statistics; x̂_instance over space,
    sample by sample. The moments of each sample are taken once and merged into the batch's. One all-reduce forward and one
    backward; none in evaluation.

    A ρ outside [0, 1] counts as the nearer end, and its gradient is that at this end, not 0: a step can bring it back. A
    map of one value has no instance part.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        rho: Share of batch norm, ``[C]``.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        running_mean: ``[C]`` or None; updated in place when training. Without it evaluation uses the batch of this rank.
        running_var: Unbiased variance over the global count, ``[C]`` or None.
        training: Use the batch and update the running statistics.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        eps: Added to the variances.
        num_batches_tracked: int64 scalar, counted up in place.
        track: Whether this batch moves the running statistics.
        group: As in :func:`sync_batch_norm`.
        num_features: Channels that ``input`` must have; by default as many as ``rho``.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``; statistics are at least float32.

    Raises:
        ValueError: If the input does not fit, or the whole group has one value per channel when training: nothing would be
            left of it.
        TypeError: If the input is not floating point.
        SyncNormError: As :func:`sync_batch_norm`.
        SyncNormMismatch: As :func:`sync_batch_norm`.

    Reference: Nam & Kim (2018), arXiv:1805.07925, equations 3 and 4.
    """
    num_features = rho.numel() if num_features is None else num_features
    if training:
        ranks = enter(input, eps, group, num_features, input_dims)
    else:
        validate(input, num_features, input_dims)
        ranks = LOCAL
    running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum, tracked=track)
    moments = sample_and_batch_moments(input, running, training=training, group=ranks, site=site, refuse_one_value=True)
    rho = rho.to(moments.mean.dtype)
    rho = rho + (rho.clamp(0, 1) - rho).detach()
    of_batch = rho * torch.rsqrt(moments.var + eps)
    of_sample = (1 - rho) * torch.rsqrt(moments.sample_var + eps)
    if weight is not None:
        of_batch, of_sample = of_batch * weight, of_sample * weight
    # Both parts are affine in x, sample by sample: one pass over it does for the two.
    shift = of_batch * (moments.sample_mean - moments.mean)
    if bias is not None:
        shift = shift + bias
    return normalize_samples(input, moments.sample_mean, of_batch + of_sample, shift)
