"""The other meeting: one row per rank, for what a sum cannot merge without loss, and for minima and maxima.

A layer's exchange sums n·μ and M2 + n·μ² and so loses 1e-16·(mean/std)² of the variance, which no activation notices. Data
may: a timestamp of mean 1.7e9 and spread 1 has no digit left. Here each rank's own mean and M2 travel, and every rank folds
them in the same order, so that all get the same bits.
"""

# R ranks, W words

import torch
from torch import Tensor

from syncnorm.distributed.collectives import all_gather, group_device
from syncnorm.distributed.groups import Group
from syncnorm.errors import SyncNormMismatch

__all__ = ["gather_rows", "send_refusal"]


def gather_rows(row: Tensor, group: Group) -> Tensor:
    """The rows of all ranks of ``group``, in their order.

    Args:
        row: float64 ``[W]``, of equal W on all ranks.
        group: The ranks that meet; a group of one meets nobody.

    Returns:
        float64 ``[R, W]`` on the device of ``row``.

    Raises:
        SyncNormMismatch: If a rank refused its data (:func:`send_refusal`). On an accelerator only where the rows travel
            through the host: elsewhere they would have to be read back to know.
    """
    if group.size == 1:
        return row.unsqueeze(0)
    return _meet(torch.cat([row, row.new_zeros(1)]), group)[:, :-1]


def send_refusal(num_words: int, device: torch.device, group: Group) -> None:
    """Meet the other ranks in place of a row of ``num_words`` that this rank cannot give, so that they do not wait."""
    if group.size > 1 and not torch.compiler.is_compiling():
        refusal = torch.zeros(num_words + 1, dtype=torch.float64, device=device)
        refusal[-1] = 1
        _meet(refusal, group, check=False)


def _meet(row: Tensor, group: Group, *, check: bool = True) -> Tensor:
    sent = row
    if row.device.type == "cpu" and not torch.compiler.is_compiling():
        sent = row.to(group_device(group.name))  # NCCL has no CPU tensors
    rows = all_gather(sent, group.name, group.size).to(row.device)
    if check and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        refused = int(rows[:, -1].sum())
        if refused:
            raise SyncNormMismatch(
                f"{refused} of {group.size} ranks refused their data and raised an error of their own; look there for the "
                "cause. Nothing was changed on this rank."
            )
    return rows
