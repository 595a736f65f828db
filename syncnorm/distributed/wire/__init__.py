"""The seam of the wire: one row in, its sum over the ranks of a group out, the same bits on all of them."""

from torch import Tensor

from syncnorm.distributed.collectives import all_reduce_sum
from syncnorm.distributed.groups import Group

__all__ = ["sum_row"]


def sum_row(row: Tensor, group: Group) -> Tensor:
    """Sum ``row`` over the ranks of ``group``, which all call this; may reuse its memory.

    Args:
        row: float64, contiguous, of one shape on all ranks.
        group: The ranks that meet, more than one.

    Returns:
        Tensor like ``row``, bit for bit the same on all ranks.
    """
    return all_reduce_sum(row, group.name)
