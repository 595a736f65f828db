"""The other meeting: one row per rank, for what a sum cannot merge without loss, and for minima and maxima.

A layer's exchange sums n·μ and M2 + n·μ² and so loses 1e-16·(mean/std)² of the variance, which no activation notices. Data
may: a timestamp of mean 1.7e9 and spread 1 has no digit left. Here each rank's own mean and M2 travel, and every rank folds
them in the same order, so that all get the same bits.
"""

# R ranks, W words of 8 bytes

from contextlib import suppress

import torch
from torch import Tensor

from syncnorm.distributed.agreement import POISON, meet
from syncnorm.distributed.collectives import all_gather, group_device, group_position
from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import Call
from syncnorm.distributed.observers import observed
from syncnorm.distributed.row import Sums
from syncnorm.errors import SyncNormMismatch

__all__ = ["gather_rows", "send_refusal"]

_TOGETHER = 250  # words of all ranks that travel in the row by which they agree, which is never shorter


def gather_rows(row: Tensor, group: Group, call: Call | None = None) -> Tensor:
    """The rows of all ranks of ``group``, in their order.

    Rows in host memory travel in one exchange by which the ranks agree, as those of a layer do: each rank's beside zeros in
    the places of the others, so that their sum is all of them. Where that is more than 250 halves of words, the rows
    follow in a second collective.

    Args:
        row: float64 or int64 ``[W]``, of equal W on all ranks.
        group: The ranks that meet; a group of one meets nobody.
        call: Of the layer that they belong to.

    Returns:
        Like ``row``, ``[R, W]``, on its device.

    Raises:
        SyncNormMismatch: On every rank, if one refused its data (:func:`send_refusal`) or is elsewhere. Not for rows on an
            accelerator, which would have to be read back to know, nor in a compiled graph.
    """
    if group.size == 1:
        return row.unsqueeze(0)
    if not _on_host(row):
        return _all_rows(torch.cat([row, row.new_zeros(1)]), group)[:, :-1]
    device = group_device(group.name)  # NCCL has no CPU tensors
    # float64 holds each half exactly, whatever the bits of the row mean.
    halves = row.detach().contiguous().view(torch.int32)
    together = group.size * len(halves) <= _TOGETHER
    mine = torch.zeros(group.size if together else 0, len(halves), dtype=torch.float64)
    if together:
        mine[group_position(group.name)] = halves
    what = f"gather of {len(row)} words"
    total: Tensor = meet(Sums(mine.flatten().to(device)), group, call, what, always=True)
    if together:
        return total.to(row.device, torch.int32).view(row.dtype).view(group.size, len(row))
    return _all_rows(row.to(device), group).to(row.device)


def send_refusal(num_words: int, device: torch.device, group: Group, call: Call | None = None) -> None:
    """Meet the other ranks in place of a row of ``num_words`` that this rank cannot give, so that they do not wait."""
    if group.size == 1 or torch.compiler.is_compiling():
        return
    if device.type != "cpu":
        refusal = torch.zeros(num_words + 1, dtype=torch.float64, device=device)
        refusal[-1] = 1
        _all_rows(refusal, group)
        return
    nothing = torch.zeros(0, dtype=torch.float64, device=group_device(group.name))
    with suppress(SyncNormMismatch):  # it is this rank that refused
        meet(Sums(nothing), group, call, "gather", POISON, always=True)


def _all_rows(row: Tensor, group: Group) -> Tensor:
    return observed(row, all_gather, row, group.name, group.size)


def _on_host(row: Tensor) -> bool:
    return row.device.type == "cpu" and not torch.compiler.is_compiling()
