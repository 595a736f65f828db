"""How the ranks of a group agree on one way for their rows, before the first of them.

Each rank puts what it knows into the store; the first rank of the group decides from all of it, and what it writes back
every rank follows, errors included. So no rank chooses by itself, and a choice does not depend on any collective, which a
rank that is being compiled could issue out of turn.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from syncnorm.distributed.collectives import group_ranks, group_store, group_timeout
from syncnorm.distributed.ledger import check_level
from syncnorm.distributed.processes import boot_id, number
from syncnorm.distributed.wire import shm, symmetric
from syncnorm.distributed.wire.board import Board
from syncnorm.distributed.wire.crowding import crowded, own_cores, warn
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormTimeout

__all__ = ["Facts", "Way", "agree", "decide", "facts", "own_objection", "unlike_checks"]


class Facts(NamedTuple):
    """What one rank tells.

    Attributes:
        asked: The exchange that it was asked for.
        host: Boot id of its host; empty where there is none.
        process: Its process number and start.
        threads: Threads that torch uses in it.
        cores: The cores it may run on, as a hexadecimal mask.
        objection: Why it cannot have what was asked for, or shared memory if nothing was; None if it can.
        check: How much it compares, which says how long its rows are.
    """

    asked: str
    host: str
    process: shm.Process
    threads: int
    cores: str
    objection: str | None
    check: str = "inline"


class Way(NamedTuple):
    """What was agreed.

    Attributes:
        name: ``"collective"``, ``"shm"`` or ``"symmetric"``.
        why: The reason, in words.
        carrier: What carries the rows, unless it is the collective.
    """

    name: str
    why: str
    carrier: shm.Segment | symmetric.Symmetric | None = None


def facts(asked: str, device_type: str) -> Facts:
    """The facts of this rank, for rows on a type of device."""
    objection = own_objection(asked, device_type)
    threads = torch.get_num_threads()
    return Facts(asked, boot_id(), shm.this_process(), threads, own_cores(), objection, check_level())


def own_objection(asked: str, device_type: str) -> str | None:
    """Why this rank cannot have what it was asked for, or shared memory if nothing was; None if it can."""
    home = "cuda" if asked == "symmetric" else "cpu"
    if device_type != home:
        return f"it serves rows on {home}, these are on {device_type}."
    if not boot_id():
        return "this system has no boot id to tell hosts apart."
    return symmetric.objection() if asked == "symmetric" else shm.objection()


def decide(told: Sequence[Facts], members: Sequence[int]) -> tuple[str, str]:
    """The way for these ranks (``"mismatch"`` and ``"refused"`` are errors), and the reason."""
    where = "syncnorm.set_exchange, SYNCNORM_EXCHANGE"
    unlike = _unlike("were asked for different exchanges", where, [fact.asked for fact in told], members)
    unlike = unlike or unlike_checks([fact.check for fact in told], members)
    if unlike:
        return "mismatch", unlike
    if told[0].asked == "collective":
        return "collective", "asked for by name"
    wanted = "symmetric" if told[0].asked == "symmetric" else "shm"
    why_not = _objection(told, members)
    if why_not is None:
        return wanted, f"{len(told)} ranks share memory on one host" if wanted == "shm" else "asked for by name"
    return _without(told, f"{wanted}: {why_not}")


def unlike_checks(levels: Sequence[str], members: Sequence[int]) -> str:
    """What is wrong with the levels at which these ranks compare; empty if they are one."""
    return _unlike("compare at different levels", "syncnorm.set_check, SYNCNORM_CHECK", levels, members)


def _unlike(what: str, where: str, values: Sequence[str], members: Sequence[int]) -> str:
    first = {value: rank for rank, value in reversed(list(zip(members, values, strict=True)))}
    if len(first) < 2:
        return ""
    one = ", ".join(f"{value!r} on rank {rank}" for value, rank in sorted(first.items(), key=lambda i: i[1]))
    return f"ranks of one group {what}: {one}. Set the same on all of them ({where})."


def _without(told: Sequence[Facts], why: str) -> tuple[str, str]:
    """What becomes of ranks that cannot have what they want."""
    return ("collective" if told[0].asked == "auto" else "refused"), why


def _objection(told: Sequence[Facts], members: Sequence[int]) -> str | None:
    for rank, fact in zip(members, told, strict=True):
        if fact.objection is not None:
            return f"rank {rank}: {fact.objection}"
        if fact.host != told[0].host:
            return f"ranks {members[0]} and {rank} are on different hosts."
    return None


def agree(name: str, device_type: str, asked: str) -> Way:
    """Agree on the way of the named group. All its ranks call this, once each.

    Raises:
        SyncNormMismatch: On all ranks, if they were asked for different things.
        SyncNormError: On all ranks, if what they were asked for is impossible.
        SyncNormPeerLost: If one is interrupted, or ends, while they agree.
        SyncNormTimeout: If a rank does not come within the group's time limit; the text names it.
    """
    members = group_ranks(name)
    place = members.index(dist.get_rank())
    limit = group_timeout(name, device_type).total_seconds()
    store = dist.PrefixStore(device_type, group_store(name))
    # Numbered, for a group that is made again has the same name and may have the same store.
    board = Board(dist.PrefixStore(str(store.add(f"made/{place}", 1)), store), place, members, limit)
    attempt = _Attempt(name, place, members, limit)
    try:
        board.introduce()
        board.post(f"facts/{place}", facts(asked, device_type))
        verdict = _lead(board, attempt) if place == 0 else _follow(board, attempt)
    except SyncNormError:
        raise
    except BaseException as error:  # also Ctrl-C: the others must learn that this rank will not come
        board.leave(f"{type(error).__name__} {error}".strip())
        raise
    if str(place) in verdict["crowded"]:
        warn(*verdict["crowded"][str(place)])
    way, why = verdict["way"], verdict["why"]
    if way == "mismatch":
        raise SyncNormMismatch(why)
    if way == "late":
        raise SyncNormTimeout(why)
    if way == "refused":
        raise SyncNormError(
            f'the exchange "{asked}" was asked for by name and is impossible here: {why} Use "auto" or "collective" '
            "(syncnorm.set_exchange, SYNCNORM_EXCHANGE)."
        )
    return Way(way, why, attempt.carrier([(int(pid), str(started)) for pid, started in verdict["processes"]], way))


class _Attempt:
    """One rank's side of trying whether the memory of a way is really one memory for all."""

    def __init__(self, name: str, place: int, members: tuple[int, ...], limit: float) -> None:
        self._name, self._place, self._members, self._limit = name, place, members, limit
        self._shared: shm.Shared | None = None
        self._symmetric: symmetric.Symmetric | None = None
        self._fd = -1

    def offer(self, way: str) -> list[Any]:
        """What the first rank tells the others, to come to the same memory."""
        if way == "symmetric":
            return [way]
        self._fd, file, self._shared = shm.create(len(self._members))
        self._shared.probe(self._place)
        return [way, number(), self._fd, file]

    def join(self, way: str, *where: Any) -> str | None:
        """Come to what was offered; what failed, in words."""
        try:
            if way == "symmetric":
                self._symmetric = symmetric.join(self._name, self._place, self._members, self._limit)
            elif self._shared is None:
                pid, fd, file = where
                self._shared = shm.attach(pid, fd, file, len(self._members))
                self._shared.probe(self._place)
        except (OSError, RuntimeError) as error:
            return str(error)
        return None

    def close(self) -> list[int]:
        """When all have come: places of ranks that have left no mark."""
        if self._fd >= 0:
            os.close(self._fd)
        return [] if self._shared is None else self._shared.unproven()

    def carrier(self, processes: list[shm.Process], way: str) -> shm.Segment | symmetric.Symmetric | None:
        """What carries the rows from now on."""
        if way == "shm":
            assert self._shared is not None
            return shm.Segment(self._shared, self._place, self._members, processes, self._limit)
        return self._symmetric if way == "symmetric" else None


def _lead(board: Board, attempt: _Attempt) -> dict[str, Any]:
    """Decide for all. What needs memory in common is first tried by all, and is the verdict only if it held."""
    members, told = board.members, []
    offered = False
    try:
        told = [Facts(*fact) for fact in board.read([f"facts/{place}" for place in range(len(members))])]
        way, why = decide(told, members)
        if way in ("shm", "symmetric"):
            wanted = way
            try:
                offer = attempt.offer(way)
                board.post("offer", offer)
                offered = True
                board.post("joined/0", attempt.join(*offer))
                failed = board.read([f"joined/{place}" for place in range(len(members))])
                reasons = [f"rank {rank}: {reason}." for rank, reason in zip(members, failed, strict=True) if reason]
            finally:
                unproven = attempt.close()
            reasons += [f"what rank {members[place]} wrote did not arrive." for place in unproven]
            if reasons:
                way, why = _without(told, f"{wanted}: {reasons[0]}")
    except SyncNormTimeout as late:
        way, why = "late", str(late)
    except OSError as error:
        way, why = _without(told, f"shm: rank {members[0]}: {error}.")
    if not offered:
        board.post("offer", None)
    verdict = {
        "way": way,
        "why": why,
        "processes": [fact.process for fact in told] if way == "shm" else [],
        "crowded": {str(place): host for place, host in crowded(told).items()},
    }
    board.post("verdict", verdict)
    return verdict


def _follow(board: Board, attempt: _Attempt) -> dict[str, Any]:
    (offer,) = board.read(["offer"])
    if offer is not None:
        board.post(f"joined/{board.place}", attempt.join(*offer))
    (verdict,) = board.read(["verdict"])
    return dict(verdict)
