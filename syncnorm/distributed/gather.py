"""The other meeting: one row per rank, for what a sum cannot merge without loss, and for minima and maxima.

A layer's exchange sums n·μ and M2 + n·μ² and so loses 1e-16·(mean/std)² of the variance, which no activation notices. Data
may: a timestamp of mean 1.7e9 and spread 1 has no digit left. Here each rank's own mean and M2 travel, and every rank folds
them in the same order, so that all get the same bits.
"""

# R ranks, W words

import torch
from torch import Tensor

from syncnorm.distributed.collectives import all_gather, group_device, group_ranks
from syncnorm.distributed.groups import Group
from syncnorm.errors import SyncNormMismatch

__all__ = ["gather_rows", "send_refusal"]

# Words of what meets first, whatever the row: two lengths on the wire would end a healthy process on gloo.
_FIRST = 256
_HEAD = 2  # whether this rank refused its data, and how long its row is


def gather_rows(row: Tensor, group: Group) -> Tensor:
    """The rows of all ranks of ``group``, in their order.

    One collective, and a second one for a row in host memory of more than 254 words.

    Args:
        row: float64 or int64 ``[W]``, of equal W on all ranks.
        group: The ranks that meet; a group of one meets nobody.

    Returns:
        Like ``row``, ``[R, W]``, on its device.

    Raises:
        SyncNormMismatch: If a rank refused its data (:func:`send_refusal`), or W differs. Not for rows on an accelerator,
            which would have to be read back to know, nor in a compiled graph.
    """
    if group.size == 1:
        return row.unsqueeze(0)
    if not _on_host(row):
        return _meet(torch.cat([row, row.new_zeros(1)]), group)[:, :-1]
    first = _first(row, refused=False)
    rows = _meet(first, group)
    _compare(rows[:, :_HEAD].tolist(), group)
    rest = row[_FIRST - _HEAD :]
    if rest.numel():
        rows = torch.cat([rows, _meet(rest, group)], dim=1)
    return rows[:, _HEAD : _HEAD + row.numel()]


def send_refusal(num_words: int, device: torch.device, group: Group) -> None:
    """Meet the other ranks in place of a row of ``num_words`` that this rank cannot give, so that they do not wait."""
    if group.size == 1 or torch.compiler.is_compiling():
        return
    if device.type == "cpu":
        _meet(_first(torch.zeros(0, dtype=torch.float64), refused=True), group)
        return
    refusal = torch.zeros(num_words + 1, dtype=torch.float64, device=device)
    refusal[-1] = 1
    _meet(refusal, group)


def _on_host(row: Tensor) -> bool:
    return row.device.type == "cpu" and not torch.compiler.is_compiling()


def _first(row: Tensor, *, refused: bool) -> Tensor:
    first = row.new_zeros(_FIRST)
    first[0], first[1] = int(refused), row.numel()
    part = row[: _FIRST - _HEAD]
    first[_HEAD : _HEAD + part.numel()] = part
    return first


def _meet(row: Tensor, group: Group) -> Tensor:
    sent = row.to(group_device(group.name)) if _on_host(row) else row  # NCCL has no CPU tensors
    return all_gather(sent, group.name, group.size).to(row.device)


def _compare(heads: list[list[float]], group: Group) -> None:
    ranks = group_ranks(group.name)
    refused = [rank for rank, head in zip(ranks, heads, strict=True) if head[0]]
    if refused:
        raise SyncNormMismatch(
            f"{len(refused)} of {group.size} ranks refused their data (ranks {refused}) and raised an error of their own; look "
            "there for the cause. Nothing was changed on this rank."
        )
    lengths: dict[int, list[int]] = {}
    for rank, head in zip(ranks, heads, strict=True):
        lengths.setdefault(int(head[1]), []).append(rank)
    if len(lengths) > 1:
        found = "; ".join(f"{length} words on ranks {ranks}" for length, ranks in lengths.items())
        raise SyncNormMismatch(
            f"ranks must bring rows of one length, got {found}: their models differ, or they are at different calls. Nothing "
            "was changed on this rank."
        )
