"""What a layer does when NaN or infinity arrives: let it through, keep it from the running statistics, or name it."""

from typing import Literal, get_args

import torch
from torch import Tensor

from syncnorm.core.moments import Moments
from syncnorm.distributed.collectives import group_ranks
from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import Group
from syncnorm.errors import SyncNormNonFinite

__all__ = ["OnNonFinite", "check_policy", "refuse_nonfinite"]

OnNonFinite = Literal["propagate", "skip_update", "raise"]
_POLICIES = get_args(OnNonFinite)

_TEXT = "the statistics of the batch are not finite"
_SHOWN = 8


def check_policy(policy: str) -> None:
    """Raise ValueError for an unknown policy."""
    if policy not in _POLICIES:
        raise ValueError(f"on_nonfinite must be one of {list(_POLICIES)}, got {policy!r}.")


def refuse_nonfinite(local: Moments, moments: Moments, group: Group) -> None:
    """Raise on every rank if the moments of all of them are not finite, naming the ranks and channels it came from.

    On an accelerator the host waits for the answer.

    Args:
        local: This rank's moments.
        moments: Those of all ranks, the same bits everywhere.
        group: The ranks that have met.

    Raises:
        SyncNormNonFinite: On every rank alike, with ``ranks``: the channels of each rank that has one.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(_is_finite(moments).all(), f"{_TEXT}, which on_nonfinite='raise' forbids.")
        return
    if bool(_is_finite(moments).all()):
        return
    flags = (~_is_finite(local)).double()
    rows = gather_rows(flags, group) if group.size > 1 else flags.unsqueeze(0)
    ranks = group_ranks(group.name) if group.size > 1 else (0,)
    found = {rank: row.nonzero().flatten().tolist() for rank, row in zip(ranks, rows.cpu(), strict=True) if row.any()}
    if not found:
        where = "every rank's are, but their sums are beyond float64"
    else:
        where = "; ".join(f"rank {rank}: channels {_shown(channels)}" for rank, channels in found.items())
    raise SyncNormNonFinite(
        f"{_TEXT}: {where}. Nothing was changed. Look there for NaN or infinity in the input of this layer, or for values "
        "beyond 1e18, whose squares float32 cannot add up; or let it through with on_nonfinite='propagate'.",
        found,
    )


def _is_finite(moments: Moments) -> Tensor:
    return moments.mean.isfinite() & moments.m2.isfinite()


def _shown(channels: list[int]) -> str:
    more = f" and {len(channels) - _SHOWN} more" if len(channels) > _SHOWN else ""
    return f"{channels[:_SHOWN]}{more}"
