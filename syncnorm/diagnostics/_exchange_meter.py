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
        self._sum = agreement._sum
        self._put(self._measure)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put(self._sum)

    def _put(self, function: Any) -> None:
        agreement.__dict__["_sum"] = function

    def _measure(self, row: Tensor, group: Any, place: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self._sum(row, group, place)
        self.exchanges += 1
        self.num_bytes += row.numel() * row.element_size()
        began = time.perf_counter()
        try:
            return self._sum(row, group, place)
        finally:
            self.seconds += time.perf_counter() - began
