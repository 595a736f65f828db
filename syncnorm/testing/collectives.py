"""Counts what a piece of code sends, by watching torch's collectives from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

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

    DDP's own gradient buckets are reduced in C++ and are not counted.

    Yields:
        Calls by name, filled while the block runs.
    """
    counts: dict[str, int] = {}
    originals = {name: getattr(dist, name) for name in _WATCHED}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **kwargs)

        return call

    for name in _WATCHED:
        setattr(dist, name, watched(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
