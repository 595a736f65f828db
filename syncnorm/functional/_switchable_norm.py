"""Switchable norm: a learned mixture of the statistics of instance, layer and batch norm, the last over all ranks."""

# N batch, C channels, K statistics that are mixed

import torch
from torch import Tensor

from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional._samples import instance_moments, normalize_samples
from syncnorm.functional._sync_batch_norm import enter, validate
from syncnorm.functional._sync_moments import sample_and_batch_moments

__all__ = ["switchable_norm"]


def switchable_norm(
    input: Tensor,
    mean_logits: Tensor,
    var_logits: Tensor,
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
    """Normalise by a mixture of means and a mixture of variances: ``y = (x - Σ w_k μ_k) / √(Σ w'_k σ²_k + eps) · γ + β``.

    k runs over instance, layer and batch; w is the softmax of ``mean_logits`` and w' that of ``var_logits``. The moments of
    each sample and channel are taken once and merged into the other two, those of the batch over all ranks of the group.
    One all-reduce forward and one backward; none in evaluation, nor for two logits.

    All variances are biased, as in the paper. A map of one value has instance mean x and instance variance 0; a single
    value per channel in the whole group is treated likewise by the batch part, and is not an error: the layer part has C.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        mean_logits: ``[3]``: instance, layer, batch; ``[2]`` leaves the batch out.
        var_logits: Likewise.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        running_mean: ``[C]`` or None; updated in place when training. Without it evaluation uses the batch of this rank.
        running_var: Unbiased variance over the global count, ``[C]`` or None.
        training: Use the batch and update the running statistics.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        eps: Added to the mixed variance.
        num_batches_tracked: int64 scalar, counted up in place.
        track: Whether this batch moves the running statistics.
        group: As in :func:`sync_batch_norm`.
        num_features: As in :func:`sync_batch_norm`.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``; statistics are at least float32.

    Raises:
        ValueError: If the input or the logits do not fit.
        TypeError: If the input is not floating point.
        SyncNormError: As :func:`sync_batch_norm`.
        SyncNormMismatch: As :func:`sync_batch_norm`.

    Reference: Luo et al. (2019), arXiv:1806.10779, equations 3 to 5.
    """
    num_mixed = mean_logits.numel()
    if num_mixed not in (2, 3) or mean_logits.shape != (num_mixed,) or var_logits.shape != mean_logits.shape:
        raise ValueError(
            "mean_logits and var_logits must both have 3 elements (instance, layer, batch) or both 2 (without batch), got "
            f"{list(mean_logits.shape)} and {list(var_logits.shape)}."
        )
    if num_features is None:
        known = next((t for t in (weight, bias, running_mean) if t is not None), None)
        num_features = None if known is None else known.numel()
    if num_mixed == 3 and training:
        ranks = enter(input, eps, group, num_features, input_dims)
    else:
        validate(input, num_features, input_dims)
        ranks = LOCAL
    if num_mixed == 3:
        running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum, tracked=track)
        moments = sample_and_batch_moments(input, running, training=training, group=ranks, site=site)
        sample_mean, sample_var = moments.sample_mean, moments.sample_var
    else:
        sample_mean, sample_var = instance_moments(input)
    layer_mean = sample_mean.mean(1, keepdim=True)
    # Not ⟨σ² + μ²⟩ - μ²: in float32 that is 20 % off at mean/std = 1e3.
    layer_var = (sample_var + (sample_mean - layer_mean).square()).mean(1, keepdim=True)
    by_mean, by_var = (logits.to(sample_mean.dtype).softmax(0) for logits in (mean_logits, var_logits))
    mean = by_mean[0] * sample_mean + by_mean[1] * layer_mean
    var = by_var[0] * sample_var + by_var[1] * layer_var
    if num_mixed == 3:
        mean, var = mean + by_mean[2] * moments.mean, var + by_var[2] * moments.var
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    return normalize_samples(input, mean, scale, bias)
