"""The one meeting of a layer: a packed float64 row per direction, summed over the ranks of its group.

Forward the row carries the moments; backward the two sums of the gradient; either carries what ranks agree by. All ranks
receive the same bits from the same reduction, so their buffers stay bitwise equal.
"""

# R ranks, C channels

from contextlib import suppress

import torch
from torch import Tensor

from syncnorm.core.moments import Moments, from_sums, to_sums
from syncnorm.distributed.agreement import POISON, meet, sum_traced
from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import Call
from syncnorm.distributed.row import LocalMoments, Sums, on_host
from syncnorm.errors import SyncNormMismatch

__all__ = ["exchange_means", "exchange_moments", "exchange_row", "exchange_sums", "send_poison"]


def exchange_moments(local: Moments, group: Group, *, needs_backward: bool, call: Call | None = None) -> Moments:
    """Moments over all ranks of ``group``, from those of this rank.

    Args:
        local: This rank's moments, ``mean`` and ``m2`` [C]; count 0 for an empty shard.
        group: The ranks that meet. A group of one gives ``local`` back.
        needs_backward: Whether a backward exchange follows on this rank.
        call: The forward call that this is.

    Raises:
        SyncNormMismatch: On every rank alike, if ranks are at different places, disagree on the backward to come, or one
            refused its input; see :func:`syncnorm.distributed.agreement.meet`.
    """
    if group.size == 1:
        return local
    if torch.compiler.is_compiling():
        return from_sums(sum_traced(to_sums(local), group, "forward", float(needs_backward)))
    moments: Moments = meet(LocalMoments(local), group, call, "forward", float(needs_backward))
    return moments


def exchange_row(
    row: Tensor, group: Group, *, needs_backward: bool, call: Call | None = None
) -> tuple[Tensor, float | None]:
    """Sum a row whose first word is a count over the ranks, in a forward.

    Args:
        row: float64 ``[n]``.
        group: The ranks that meet.
        needs_backward: Whether a backward exchange follows on this rank.
        call: The forward call that it belongs to.

    Returns:
        The summed row, and its first word where the host may read it.

    Raises:
        SyncNormMismatch: As :func:`exchange_moments`.
    """
    if group.size == 1:
        return row, None
    row = _sum(Sums(row), group, call, "forward", float(needs_backward))
    return row, float(row.numpy()[0]) if not torch.compiler.is_compiling() and on_host(row) else None


def exchange_sums(local: Tensor, group: Group, call: Call | None = None, direction: str = "backward") -> Tensor:
    """Sum of ``local`` (float64, any shape) over the ranks of ``group``.

    Raises:
        SyncNormMismatch: If ranks are at different places.
    """
    return local if group.size == 1 else _sum(Sums(local), group, call, direction)


def exchange_means(
    local: Tensor, count: Tensor | float, group: Group, call: Call | None = None, direction: str = "backward"
) -> Tensor:
    """:func:`exchange_sums`, over ``count``."""
    return local / count if group.size == 1 else _sum(Sums(local, count), group, call, direction)


def _sum(sums: Sums, group: Group, call: Call | None, direction: str, word: float = 0.0) -> Tensor:
    if torch.compiler.is_compiling():
        total = sum_traced(sums.sums.reshape(-1), group, direction, word).view(sums.sums.shape)
        return total if sums.divisor is None else total / sums.divisor
    met: Tensor = meet(sums, group, call, direction, word)
    return met


def send_poison(
    num_features: int, device: torch.device, group: Group, call: Call | None = None, direction: str = "forward"
) -> None:
    """Meet the other ranks in place of an exchange that this rank refuses, so that they raise and do not wait.

    This rank raises an error of its own afterwards. A backward of ranks that do not compare has no room for such a word.
    """
    if call is None and direction != "forward":
        return
    row = torch.zeros(2 * num_features + 1, dtype=torch.float64, device=device)
    with suppress(SyncNormMismatch):  # it is this rank that refused
        meet(Sums(row), group, call, direction, POISON)
