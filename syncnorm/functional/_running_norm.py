"""Normalisation by the moments of everything seen so far, on all ranks: what reinforcement learning does to observations."""

# F features, R ranks

import torch
from torch import Tensor

from syncnorm.core.features import add_moments, feature_moments
from syncnorm.core.moments import Moments, merge_moments
from syncnorm.core.traced import not_recomputed
from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import Group, group_spec, resolve
from syncnorm.distributed.ledger import begin_call
from syncnorm.functional._checkpoint import is_recomputing, recall_call, remember_call
from syncnorm.functional._standardize import check_features, standardize

__all__ = ["merge_running_moments", "running_norm", "running_std", "update_running_moments"]


def running_norm(
    input: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    training: bool = False,
    eps: float = 1e-8,
    clip: float | None = 10.0,
    *,
    group: object = "world",
    site: object = None,
) -> Tensor:
    """Standardise ``input`` by the moments of all samples that came before it and, when training, of itself.

    Args:
        input: ``[*, *shape]``, any real dtype: one sample, a batch of them, or none.
        count: Samples so far, float64 ``[1]``; moved in place when training, as are ``mean`` and ``m2``.
        mean: Their mean, float64 ``[*shape]``.
        m2: Their sum of squared deviations, float64 ``[*shape]``.
        training: First merge the samples of ``input`` on all ranks into the moments, in one exchange.
        eps: Added to the variance.
        clip: Limit the result to ``[-clip, clip]``; None for no limit.
        group: The ranks whose samples are merged, as in :func:`sync_batch_norm`.
        site: The layer that this is a call of, by which ranks compare where they are.

    Returns:
        Tensor like ``input``; integers become torch's default dtype.

    Raises:
        ValueError: If the last dims of ``input`` do not fit, or (on CPU) a sample is not finite; the moments are as before.
        TypeError: If ``input`` is complex.
        SyncNormMismatch: If another rank refused its input.
    """
    recomputing = is_recomputing()
    found = recall_call(site, None) if recomputing else None
    if found is None:
        if training and not recomputing:
            update_running_moments(input, count, mean, m2, group=group, site=site)
        else:
            check_features(input, mean.shape)
        found = not_recomputed(mean), not_recomputed(running_std(count, m2, eps))
        if not recomputing and not torch.compiler.is_compiling():
            found = mean.clone(), found[1]  # the buffer moves before a checkpoint recomputes this
            remember_call(site, None, found)
    now_mean, now_std = found
    return standardize(input, now_mean, now_std, clip)


def running_std(count: Tensor, m2: Tensor, eps: float) -> Tensor:
    """``sqrt(variance + eps)``, ``[*shape]``, with the biased variance; 1 for that of fewer than two samples."""
    # One sample says nothing about the spread; a variance of 0 would make of the next one a value of 1/sqrt(eps).
    return torch.where(count > 1, m2 / count.clamp(min=1), 1.0).add(eps).sqrt()


def update_running_moments(
    input: Tensor, count: Tensor, mean: Tensor, m2: Tensor, *, group: object = "world", site: object = None
) -> None:
    """Merge the samples of ``input`` on all ranks of ``group`` into the moments, in place; see :func:`running_norm`."""
    ranks = group if isinstance(group, Group) else resolve(group_spec(group))
    try:
        check_features(input, mean.shape)
        local = feature_moments(input.detach().double().reshape(-1, mean.numel()))
    except (ValueError, TypeError, RuntimeError):
        send_refusal(2 * mean.numel() + 1, mean.device, ranks)
        raise
    merge_running_moments(local, count, mean, m2, group=ranks, site=site)


@torch.no_grad()
def merge_running_moments(
    local: Moments, count: Tensor, mean: Tensor, m2: Tensor, *, group: object = "world", site: object = None
) -> None:
    """Merge moments that each rank of ``group`` brings into the running ones, in place.

    Args:
        local: Moments of samples that nobody has merged yet, ``mean`` and ``m2`` [F].
        count: As in :func:`running_norm`.
        mean: As in :func:`running_norm`.
        m2: As in :func:`running_norm`.
        group: As in :func:`running_norm`.
        site: As in :func:`running_norm`.

    Raises:
        ValueError: On CPU, on every rank, if ``local`` is not finite on some rank.
    """
    ranks = group if isinstance(group, Group) else resolve(group_spec(group))
    if ranks.size > 1:
        word = local.mean.new_full((1,), local.count) if isinstance(local.count, float) else local.count.reshape(1)
        call = begin_call(site, ranks, local.mean.view(1, -1))
        rows = gather_rows(torch.cat([word, local.mean, local.m2]), ranks, call)
        means, m2s = rows[:, 1:].unflatten(1, (2, -1)).unbind(1)
        local = merge_moments(Moments(rows[:, 0], means, m2s))
    # A sample that is not finite would stay in the moments for ever. Where the host would have to wait to see it, the
    # update is left out.
    finite = (local.mean.isfinite() & local.m2.isfinite()).all()
    if finite.device.type == "cpu" and not torch.compiler.is_compiling() and not finite:
        where = (~(local.mean.isfinite() & local.m2.isfinite())).nonzero().flatten().tolist()
        raise ValueError(
            f"samples hold NaN or infinite values, or overflow when squared, in features {where[:8]} (flattened) on some "
            "rank. They would stay in the running moments for ever, so nothing was merged. Clean the data first."
        )
    merged = add_moments(Moments(count, mean.flatten(), m2.flatten()), local)
    for old, new in ((mean, merged.mean), (m2, merged.m2)):
        old.copy_(torch.where(finite, new.view_as(old), old))
    count.add_(torch.where(finite, local.count, 0.0))
