"""More threads than cores on a host: found where ranks agree, said once, with what to do."""

import os
import warnings
from collections.abc import Sequence
from typing import Protocol

__all__ = ["crowded", "own_cores", "warn"]


class _Crew(Protocol):
    """What must be known of a rank: its host, its threads, its cores as a hexadecimal mask."""

    @property
    def host(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def cores(self) -> str: ...


def own_cores() -> str:
    """The cores that this process may run on, as a hexadecimal mask."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return f"{sum(1 << core for core in cores):x}"


def crowded(told: Sequence[_Crew]) -> dict[int, tuple[int, int, int]]:
    """Hosts whose ranks use more threads than they have cores: by place of their first rank, ranks, threads and cores."""
    found = {}
    for host in {fact.host for fact in told}:
        places = [place for place, fact in enumerate(told) if fact.host == host]
        threads, cores = sum(told[place].threads for place in places), 0
        for place in places:
            cores |= int(told[place].cores, 16)
        if threads > cores.bit_count():
            found[places[0]] = len(places), threads, cores.bit_count()
    return found


_warned = False


def warn(ranks: int, threads: int, cores: int) -> None:
    """Warn of a crowded host, once in this process."""
    global _warned
    if _warned:
        return
    _warned = True
    advice = [f"set OMP_NUM_THREADS={max(1, cores // ranks)}"] * (threads > ranks) + ["start fewer ranks"] * (
        ranks > cores
    )
    warnings.warn(
        f"{ranks} ranks with {threads} threads in all share {cores} cores of this host; threads then wait for a core, and "
        f"each small layer costs milliseconds. To mend it, {' and '.join(advice)}.",
        stacklevel=2,
    )
