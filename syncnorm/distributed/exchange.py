"""The one meeting of a layer: a packed float64 row per direction, summed over the ranks of its group.

Forward the row carries the moments; backward the two sums of the gradient; either carries what ranks agree by. All ranks
receive the same bits from the same reduction, so their buffers stay bitwise equal.
"""

# R ranks, C channels

from contextlib import suppress

import torch
from torch import Tensor

from syncnorm.core.moments import Moments
from syncnorm.distributed.agreement import POISON, Call, sum_agreed
from syncnorm.distributed.groups import Group
from syncnorm.errors import SyncNormMismatch
from syncnorm.kernels.vectors import from_sums, to_sums

__all__ = ["exchange_moments", "exchange_row", "exchange_sums", "send_poison"]


def exchange_moments(local: Moments, group: Group, *, needs_backward: bool, call: Call | None = None) -> Moments:
    """Moments over all ranks of ``group``, from those of this rank.

    Args:
        local: This rank's moments, ``mean`` and ``m2`` [C]; count 0 for an empty shard.
        group: The ranks that meet. A group of one gives ``local`` back.
        needs_backward: Whether a backward exchange follows on this rank.
        call: The forward call that this is.

    Raises:
        SyncNormMismatch: On every rank alike, if ranks are at different places, disagree on the backward to come, or one
            refused its input; see :func:`syncnorm.distributed.agreement.sum_agreed`.
    """
    if group.size == 1:
        return local
    row, count = exchange_row(to_sums(local), group, needs_backward=needs_backward, call=call)
    return from_sums(row, count)


def exchange_row(
    row: Tensor, group: Group, *, needs_backward: bool, call: Call | None = None, direction: str = "forward"
) -> tuple[Tensor, float | None]:
    """Sum a row whose first word is a count over the ranks.

    Args:
        row: float64 ``[2C + 1]``.
        group: The ranks that meet.
        needs_backward: Whether a backward exchange follows on this rank.
        call: The forward call that it belongs to.
        direction: What the row is, in a word.

    Returns:
        The summed row, and its first word where the host may read it.

    Raises:
        SyncNormMismatch: As :func:`exchange_moments`.
    """
    if group.size == 1:
        return row, None
    row = sum_agreed(row, group, call, direction, float(needs_backward))
    if torch.compiler.is_compiling() or row.device.type != "cpu" or type(row) is not Tensor:
        return row, None
    return row, float(row.numpy()[0])  # host memory: no tensor operation, and nothing to wait for


def exchange_sums(local: Tensor, group: Group, call: Call | None = None, direction: str = "backward") -> Tensor:
    """Sum of ``local`` (float64, any shape) over the ranks of ``group``.

    Raises:
        SyncNormMismatch: If ranks are at different places.
    """
    return local if group.size == 1 else sum_agreed(local.reshape(-1), group, call, direction).view(local.shape)


def send_poison(num_features: int, device: torch.device, group: Group, call: Call | None = None) -> None:
    """Meet the other ranks in place of a forward that this rank refuses, so that they raise and do not wait.

    This rank raises an error of its own afterwards.
    """
    row = torch.zeros(2 * num_features + 1, dtype=torch.float64, device=device)
    with suppress(SyncNormMismatch):  # it is this rank that refused
        sum_agreed(row, group, call, "forward", POISON)
