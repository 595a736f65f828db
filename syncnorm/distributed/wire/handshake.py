"""How the ranks of a group agree on one way for their rows, before the first of them.

Each rank puts what it knows into the store; the first rank of the group decides from all of it, and what it writes back
every rank follows, errors included. So no rank chooses by itself, and a choice does not depend on any collective, which a
rank that is being compiled could issue out of turn.
"""

import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from syncnorm.distributed.collectives import group_ranks, group_store, group_timeout
from syncnorm.distributed.wire import shm
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormTimeout

__all__ = ["Facts", "Way", "agree", "crowded", "decide", "facts"]


class Facts(NamedTuple):
    """What one rank tells.

    Attributes:
        asked: The exchange that it was asked for.
        host: Boot id of its host; empty where there is none.
        process: Its process number and start.
        threads: Threads that torch uses in it.
        cores: The cores it may run on, as a hexadecimal mask.
        objection: Why it cannot share memory; None if it can.
    """

    asked: str
    host: str
    process: shm.Process
    threads: int
    cores: str
    objection: str | None


class Way(NamedTuple):
    """What was agreed.

    Attributes:
        name: ``"collective"`` or ``"shm"``.
        why: The reason, in words.
        segment: The shared memory, for ``"shm"``.
    """

    name: str
    why: str
    segment: shm.Segment | None = None


def facts(asked: str) -> Facts:
    """The facts of this rank."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    host = boot_id.read_text().strip() if boot_id.exists() else ""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    mask = sum(1 << core for core in cores)
    objection = shm.objection() if host else "this system has no boot id to tell hosts apart."
    return Facts(asked, host, shm.this_process(), torch.get_num_threads(), f"{mask:x}", objection)


def decide(told: Sequence[Facts], members: Sequence[int], device_type: str) -> tuple[str, str]:
    """The way for these ranks, and the reason: ``"collective"``, ``"shm"``, or ``"mismatch"``, ``"refused"``: errors."""
    asked = {rank: fact.asked for rank, fact in zip(members, told, strict=True)}
    if len(set(asked.values())) > 1:
        first = {value: rank for rank, value in reversed(asked.items())}
        one = ", ".join(f"{value!r} on rank {rank}" for value, rank in sorted(first.items(), key=lambda item: item[1]))
        return "mismatch", (
            f"ranks of one group were asked for different exchanges: {one}. Set the same on all of them "
            "(syncnorm.set_exchange, SYNCNORM_EXCHANGE)."
        )
    if told[0].asked == "collective":
        return "collective", "asked for by name"
    why_not = _objection(told, members, device_type)
    if why_not is None:
        return "shm", f"{len(told)} ranks share memory on one host"
    return ("refused" if told[0].asked == "shm" else "collective"), f"shm: {why_not}"


def _objection(told: Sequence[Facts], members: Sequence[int], device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it serves rows on CPU, these are on {device_type}."
    for rank, fact in zip(members, told, strict=True):
        if fact.objection is not None:
            return f"rank {rank}: {fact.objection}"
        if fact.host != told[0].host:
            return f"ranks {members[0]} and {rank} are on different hosts."
    return None


def crowded(told: Sequence[Facts]) -> dict[int, tuple[int, int, int]]:
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


def agree(name: str, device_type: str, asked: str) -> Way:
    """Agree on the way of the named group. All its ranks call this, once each.

    Raises:
        SyncNormMismatch: On all ranks, if they were asked for different things.
        SyncNormError: On all ranks, if what they were asked for is impossible.
        SyncNormTimeout: If a rank does not come within the group's time limit; the text names it.
    """
    members = group_ranks(name)
    place = members.index(dist.get_rank())
    limit = group_timeout(name, device_type).total_seconds()
    store = dist.PrefixStore(device_type, group_store(name))
    # Numbered, for a group that is made again has the same name and may have the same store.
    board = _Board(dist.PrefixStore(str(store.add(f"made/{place}", 1)), store), members, limit)
    board.post(f"facts/{place}", facts(asked))
    verdict, shared = _lead(board, device_type) if place == 0 else _follow(board, place)
    if str(place) in verdict["crowded"]:
        _warn(*verdict["crowded"][str(place)])
    way, why = verdict["way"], verdict["why"]
    if way == "mismatch":
        raise SyncNormMismatch(why)
    if way == "late":
        raise SyncNormTimeout(why)
    if way == "refused":
        raise SyncNormError(
            f'the exchange "shm" was asked for by name and is impossible here: {why} Use "auto" or "collective" '
            "(syncnorm.set_exchange, SYNCNORM_EXCHANGE)."
        )
    if way == "collective":
        return Way(way, why)
    assert shared is not None
    processes = [(int(pid), str(started)) for pid, started in verdict["processes"]]
    return Way(way, why, shm.Segment(shared, place, members, processes, limit))


def _lead(board: "_Board", device_type: str) -> tuple[dict[str, Any], shm.Shared | None]:
    """Decide for all. If they may share memory, offer some, and let each show that it has it before that is the verdict."""
    members, told = board.members, []
    shared, fd = None, -1
    try:
        told = [Facts(*fact) for fact in board.read([f"facts/{place}" for place in range(len(members))])]
        way, why = decide(told, members, device_type)
        if way == "shm":
            fd, file, shared = shm.create(len(members))
            shared.probe(0)
            board.post("offer", [os.getpid(), fd, file])
            failed = board.read([f"attached/{place}" for place in range(1, len(members))])
            reasons = [f"rank {rank}: {reason}." for rank, reason in zip(members[1:], failed, strict=True) if reason]
            reasons += [f"what rank {members[place]} wrote did not arrive." for place in shared.unproven()]
            if reasons:
                way, why = ("refused" if told[0].asked == "shm" else "collective"), f"shm: {reasons[0]}"
    except SyncNormTimeout as late:
        way, why = "late", str(late)
    except OSError as error:
        way, why = ("refused" if told[0].asked == "shm" else "collective"), f"shm: rank {members[0]}: {error}."
    finally:
        if fd >= 0:
            os.close(fd)  # whoever wanted it has mapped it
    if shared is None:
        board.post("offer", None)
    processes = [fact.process for fact in told] if way == "shm" else []
    verdict = {"way": way, "why": why, "processes": processes, "crowded": crowded(told)}
    board.post("verdict", verdict)
    verdict["crowded"] = {str(place): host for place, host in crowded(told).items()}  # as it reads to the others
    return verdict, shared


def _follow(board: "_Board", place: int) -> tuple[dict[str, Any], shm.Shared | None]:
    shared = None
    (offer,) = board.read(["offer"])
    if offer is not None:
        failure = None
        try:
            pid, fd, file = offer
            shared = shm.attach(pid, fd, file, len(board.members))
            shared.probe(place)
        except OSError as error:
            failure = str(error)
        board.post(f"attached/{place}", failure)
    (verdict,) = board.read(["verdict"])
    return verdict, shared


class _Board:
    """Notes of the ranks to each other. Polled: a blocking read would keep the store from other threads of this process."""

    def __init__(self, store: dist.Store, members: tuple[int, ...], limit: float) -> None:
        self._store, self.members, self._limit = store, members, limit
        self._deadline = time.monotonic() + limit

    def post(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def read(self, keys: list[str]) -> list[Any]:
        pause = 0.0002
        while not self._store.check(keys):
            if time.monotonic() > self._deadline:
                self._raise_late()
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)
        return [json.loads(self._store.get(key)) for key in keys]

    def _raise_late(self) -> NoReturn:
        missing = [rank for place, rank in enumerate(self.members) if not self._store.check([f"facts/{place}"])]
        who = (
            f"ranks {missing} did not come" if missing else f"rank {self.members[0]} or its answer did not come in time"
        )
        raise SyncNormTimeout(
            f"{who} to the first exchange of the process group of ranks {list(self.members)} within {self._limit:g} s, its "
            "time limit. All ranks of a group run its synchronised layers, in the same order."
        )


_warned = False


def _warn(ranks: int, threads: int, cores: int) -> None:
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
