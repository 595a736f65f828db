"""What the exchanges of synchronised layers cost while a piece of code runs: how many, how many bytes, how long."""

# The one place where all of them pass is private to distributed; tests/test_norm_metrics.py fails if it moves.

import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from syncnorm.distributed import agreement

__all__ = ["ExchangeMeter"]


class ExchangeMeter:
    """Within, counts what this rank sends and how long it waits for the sums, forward and backward.

    On an accelerator the time is the host's, which does not wait there. Compiled code is not seen.

    Attributes:
        exchanges: Sums over ranks.
        num_bytes: Bytes of the rows that this rank handed over.
        seconds: Time in them, waiting for other ranks included.
    """

    def __init__(self) -> None:
        self.exchanges, self.num_bytes, self.seconds = 0, 0, 0.0

    def __enter__(self) -> Self:
        if not _RUNNING:
            agreement.__dict__["_sum"] = _measured_sum
        _RUNNING.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _RUNNING.remove(self)
        if not _RUNNING:
            agreement.__dict__["_sum"] = _sum


# Meters need not end in the reverse of the order in which they began, so what was there before is not each one's own affair.
_RUNNING: list[ExchangeMeter] = []
_sum = agreement._sum


def _measured_sum(row: Tensor, group: Any, place: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return _sum(row, group, place)
    num_bytes, began = row.numel() * row.element_size(), time.perf_counter()
    try:
        return _sum(row, group, place)
    finally:
        seconds = time.perf_counter() - began
        for meter in _RUNNING:
            meter.exchanges += 1
            meter.num_bytes += num_bytes
            meter.seconds += seconds
