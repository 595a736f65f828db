"""What ranks add up, and the row in which it travels: what is summed, zeros, and words at its end.

In host memory one native operator packs a row and one reads it, words included; elsewhere torch's operations do, and the host
does not wait for them.
"""

# C channels

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from syncnorm.core.moments import Moments, from_sums, to_sums
from syncnorm.kernels import native

__all__ = ["LocalMoments", "Payload", "Sums", "on_device", "on_host", "words_of"]


class Payload(Protocol):
    """What a rank brings.

    Attributes:
        num_words: Words of a row that it takes.
        device: Where it is.
    """

    num_words: int
    device: torch.device

    def pack(self, width: int, words: Sequence[float]) -> Tensor:
        """A row of its own memory, float64 ``[width]``."""

    def read(self, row: Tensor, num_words: int) -> tuple[Any, list[float] | None]:
        """What all ranks brought together, and the last ``num_words`` words if the host may look at them."""


class Sums:
    """float64 of any shape, which comes back as its sum over the ranks, over ``divisor`` if there is one."""

    __slots__ = ("device", "divisor", "num_words", "sums")

    def __init__(self, sums: Tensor, divisor: Tensor | float | None = None) -> None:
        self.sums, self.divisor = sums, divisor
        self.num_words, self.device = sums.numel(), sums.device

    def pack(self, width: int, words: Sequence[float]) -> Tensor:
        if _native(self.sums):
            row: Tensor = torch.ops.syncnorm.pack_sums.default(self.sums, width, words)
            return row
        return _pack(self.sums.reshape(-1), width, words)

    def read(self, row: Tensor, num_words: int) -> tuple[Tensor, list[float] | None]:
        if not isinstance(self.divisor, Tensor) and _native(row):
            read: tuple[Tensor, list[float]] = torch.ops.syncnorm.read_sums.default(
                row, self.sums.shape, self.divisor, num_words
            )
            return read
        sums = row[: self.num_words].view(self.sums.shape)
        return sums if self.divisor is None else sums / self.divisor, words_of(row, num_words)


class LocalMoments:
    """Moments of this rank, ``mean`` and ``m2`` [C], which come back as those of all ranks' samples together."""

    __slots__ = ("device", "moments", "num_words")

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.num_words, self.device = 2 * moments.mean.numel() + 1, moments.mean.device

    def pack(self, width: int, words: Sequence[float]) -> Tensor:
        count, mean, m2 = self.moments
        if isinstance(count, float) and _native(mean):
            row: Tensor = torch.ops.syncnorm.pack_moments.default(mean, m2, count, width, words)
            return row
        return _pack(to_sums(self.moments), width, words)

    def read(self, row: Tensor, num_words: int) -> tuple[Moments, list[float] | None]:
        if _native(row):
            mean, m2, count, words = torch.ops.syncnorm.read_moments.default(row, self.num_words // 2, num_words)
            return Moments(count, mean, m2), words
        count = float(row.numpy()[0]) if on_host(row) else None
        return from_sums(row[: self.num_words], count), words_of(row, num_words)


def words_of(row: Tensor, num_words: int) -> list[float] | None:
    """The last words of a row, where the host may look at them: in memory of its own, without a tensor operation."""
    return row.numpy()[row.numel() - num_words :].tolist() if on_host(row) else None


def on_host(t: Tensor) -> bool:
    """Whether the host may look into ``t``."""
    return t.is_cpu and _is_memory(t)


def on_device(t: Tensor) -> bool:
    """Whether a kernel on an accelerator may look into ``t``."""
    return t.is_cuda and _is_memory(t)


def _is_memory(t: Tensor) -> bool:
    # Beneath torch.func a tensor may be a wrapper, whose memory cannot be looked at.
    return type(t) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _native(t: Tensor) -> bool:
    return on_host(t) and native.load() is None


def _pack(vector: Tensor, width: int, words: Sequence[float]) -> Tensor:
    gap = width - vector.numel() - len(words)
    if on_host(vector):
        row = torch.zeros(width, dtype=torch.float64)
        memory = row.numpy()  # no tensor operations, which would cost 3 µs each
        memory[: vector.numel()] = vector.numpy()
        memory[width - len(words) :] = words
        return row
    if vector.is_cuda and torch.cuda.is_current_stream_capturing():
        tail = vector.new_zeros(len(words))  # a replay could not read words from the host; nobody looks at these
    else:
        tail = torch.tensor(words, dtype=torch.float64, pin_memory=vector.is_cuda).to(vector.device, non_blocking=True)
    return torch.cat([vector, vector.new_zeros(gap), tail])
