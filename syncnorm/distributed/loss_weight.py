"""The weight a rank's mean loss needs so that DDP's average over ranks is the gradient of the whole batch."""

import torch

from syncnorm.distributed import collectives
from syncnorm.distributed.exchange import exchange_sums
from syncnorm.distributed.groups import group_spec, resolve

__all__ = ["loss_weight"]


def loss_weight(num_local_samples: int, group: object = "world") -> float:
    """The factor R·n_r/N for this rank's mean loss when ranks hold different numbers of samples.

    DDP averages gradients over R ranks with equal weight. With n_r samples on rank r and N in all, the mean loss of the
    whole batch is (1/R)·Σ_r (R·n_r/N)·loss_r. With equal shards the factor is 1, and without a process group too.

    Every rank of the group must call this, one all-reduce each: a rank without samples passes 0.

    Args:
        num_local_samples: Samples (or pixels, tokens: whatever the loss averages over) on this rank.
        group: As ``process_group`` of :class:`syncnorm.SyncBatchNorm`; the group that DDP averages over.

    Returns:
        R·n_r/N; 1.0 if no rank has any sample.

    Raises:
        ValueError: If ``num_local_samples`` is negative.

    Example:
        >>> loss = torch.nn.functional.cross_entropy(logits, target) * syncnorm.loss_weight(len(target))  # doctest: +SKIP
    """
    if num_local_samples < 0:
        raise ValueError(f"num_local_samples must be at least 0, got {num_local_samples}.")
    ranks = resolve(group_spec(group))
    if ranks.size == 1:
        return 1.0
    local = torch.tensor([float(num_local_samples)], dtype=torch.float64, device=collectives.group_device(ranks.name))
    total = exchange_sums(local, ranks, None, "loss_weight").item()
    return ranks.size * num_local_samples / total if total else 1.0
