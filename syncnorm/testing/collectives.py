"""Counts what a piece of code sends, by watching torch's collectives, and our own ways beside them, from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from syncnorm.distributed.wire.shm import Segment
from syncnorm.distributed.wire.symmetric import Symmetric

__all__ = ["count_collectives"]

_WATCHED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "reduce_scatter_tensor",
)


@contextmanager
def count_collectives() -> Iterator[dict[str, int]]:
    """Count the calls of ``torch.distributed`` collectives made from Python within the block.

    A sum over shared or symmetric memory is an all-reduce, too, and counted as one. DDP's own gradient buckets are
    reduced in C++ and are not counted.

    Yields:
        Calls by name, filled while the block runs.
    """
    counts: dict[str, int] = {}
    watched = [(dist, name, name) for name in _WATCHED] + [(way, "sum", "all_reduce") for way in (Segment, Symmetric)]
    originals = [(home, name, getattr(home, name)) for home, name, _ in watched]

    def counting(label: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[label] = counts.get(label, 0) + 1
            return original(*args, **kwargs)

        return call

    for home, name, label in watched:
        setattr(home, name, counting(label, getattr(home, name)))
    try:
        yield counts
    finally:
        for home, name, original in originals:
            setattr(home, name, original)
