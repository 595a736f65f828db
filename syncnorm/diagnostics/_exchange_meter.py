"""What the exchanges of synchronised layers cost while a piece of code runs: how many, how many bytes, how long."""

from types import TracebackType

from typing_extensions import Self

from syncnorm.distributed.observers import add_observer, remove_observer

__all__ = ["ExchangeMeter"]


class ExchangeMeter:
    """Within, counts what this rank sends and how long it waits for the sums, forward and backward.

    On an accelerator the time is the host's, which does not wait there. Compiled code is not seen.

    Attributes:
        exchanges: Collectives: one for most exchanges, two where a row is too long for the one by which ranks agree.
        num_bytes: Bytes of the rows that this rank handed over.
        seconds: Time in them, waiting for other ranks included.
    """

    def __init__(self) -> None:
        self.exchanges, self.num_bytes, self.seconds = 0, 0, 0.0

    def __enter__(self) -> Self:
        add_observer(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        remove_observer(self._count)

    def _count(self, num_bytes: int, seconds: float) -> None:
        self.exchanges += 1
        self.num_bytes += num_bytes
        self.seconds += seconds
