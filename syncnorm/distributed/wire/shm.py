"""Rows summed over memory that the ranks of one host share: a few microseconds where gloo takes hundreds.

The memory is an anonymous file (a memfd) that the other ranks open through ``/proc/<pid>/fd``. So it has no name that a
crash could leave behind, and whoever opens it has proven that it shares host and process numbers with the one who made
it, which is what looking after a dead peer rests on.
"""

import ctypes
import mmap
import os
import platform
import secrets
import threading
import time
import weakref

import torch
from torch import Tensor

from syncnorm.distributed.processes import look, number, refuse_fork
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormPeerLost, SyncNormTimeout
from syncnorm.kernels import native

__all__ = ["Process", "Segment", "Shared", "attach", "create", "objection", "this_process"]

# As in kernels/native/shm.cpp: a line of 128 bytes for each rank, then two slots for each.
_LINE = 128
_SEQUENCE, _LEFT, _PROBE = 0, 2, 3  # words of 4 bytes
_WORDS = 2  # word of 8 bytes, and the next
_CAPACITY = 8192  # words of a slot; longer rows go in pieces
_MISMATCH = -2

Process = tuple[int, str]  # its number, and when it started: numbers are used again


def objection() -> str | None:
    """Why this rank cannot share memory with others, in a sentence."""
    if platform.system() != "Linux" or not hasattr(os, "memfd_create"):
        return "shared memory is implemented for Linux."
    if not this_process()[1]:
        return "/proc does not show this process."
    reason: str | None = native.load()
    if reason is None and not hasattr(torch.ops.syncnorm, "shm_sum"):
        reason = "the native operators were built without it; run `python -m syncnorm build --force`."
    return reason


def this_process() -> Process:
    """This process, as its peers will look for it."""
    return number(), look(number())[1]


class Shared:
    """The memory itself, mapped into this process; the probe of every rank shows that it is one memory for all."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self.slots = -(-size * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self.slots + size * 2 * _CAPACITY * 8
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, length)
        memory = mmap.mmap(fd, length)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.words4, self.words8 = memoryview(memory).cast("I"), memoryview(memory).cast("q")

    def probe(self, rank: int) -> None:
        """Leave the mark of ``rank``."""
        self.words4[rank * _LINE // 4 + _PROBE] = rank + 1

    def unproven(self) -> list[int]:
        """Ranks whose mark is not here."""
        return [rank for rank in range(self.size) if self.words4[rank * _LINE // 4 + _PROBE] != rank + 1]

    def leave(self, rank: int, pid: int) -> None:
        """Tell the others that ``rank`` will not come again; unless this is a fork of it."""
        if os.getpid() == pid:
            self.words4[rank * _LINE // 4 + _LEFT] = 1

    def left(self, rank: int) -> bool:
        """Whether ``rank`` will not come again."""
        return bool(self.words4[rank * _LINE // 4 + _LEFT])

    def sequence(self, rank: int) -> int:
        """The number of the last exchange that ``rank`` has come to."""
        return self.words4[rank * _LINE // 4 + _SEQUENCE]

    def words(self, rank: int, exchange: int) -> int:
        """How long a row ``rank`` brought to an exchange."""
        return self.words8[rank * _LINE // 8 + _WORDS + exchange % 2]


def create(size: int) -> tuple[int, str, Shared]:
    """Make memory for ``size`` ranks: its file descriptor, which is to be closed when all have it, its name, and itself."""
    name = f"syncnorm-{secrets.token_hex(8)}"
    fd = os.memfd_create(name)
    try:
        return fd, name, Shared(fd, size)
    except OSError:
        os.close(fd)
        raise


def attach(pid: int, fd: int, name: str, size: int) -> Shared:
    """Map the memory that process ``pid`` made.

    Raises:
        OSError: If it is not within reach: another host, another namespace of processes, another user.
    """
    path = f"/proc/{pid}/fd/{fd}"
    if not os.readlink(path).startswith(f"/memfd:{name}"):  # before it is opened: it could be anybody's file
        raise OSError(f"{path} is another file")
    mine = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return Shared(mine, size)
    finally:
        os.close(mine)


class Segment:
    """One group's shared memory, and the exchange over it. One call at a time; all ranks make the same calls.

    Args:
        shared: The memory, mapped by all ranks.
        rank: This rank's place in the group.
        members: Global ranks of the group.
        processes: The process of each.
        timeout: Seconds to wait for a rank that lives.
    """

    def __init__(
        self, shared: Shared, rank: int, members: tuple[int, ...], processes: list[Process], timeout: float
    ) -> None:
        self._shared, self._rank, self._members, self._processes = shared, rank, members, processes
        self._timeout = timeout
        self._state = (ctypes.c_int64 * 7)(
            shared.address, shared.address + shared.slots, rank, len(members), _CAPACITY, 1, 0
        )
        self._handle = ctypes.addressof(self._state)
        self._pid = os.getpid()
        self._broken: str | None = None
        self._lock = threading.Lock()
        self._op, self._resume = torch.ops.syncnorm.shm_sum.default, torch.ops.syncnorm.shm_resume.default
        self._leave = weakref.finalize(self, shared.leave, rank, self._pid)

    def sum(self, row: Tensor) -> Tensor:
        """Sum ``row`` (float64, contiguous) over the ranks, in place; the same bits on all of them.

        Raises:
            SyncNormPeerLost: If a rank has died or left, within a second.
            SyncNormTimeout: If one lives and does not come within the time limit.
            SyncNormMismatch: On all ranks alike, if they brought rows of different lengths.
            SyncNormError: In a fork of the process that joined the group, or after one of the first two.
        """
        refuse_fork(self._pid, self._members[self._rank])
        with self._lock:
            if self._broken is not None:
                raise SyncNormError(
                    f"an earlier exchange of this process group failed ({self._broken}), and its ranks are out of step. "
                    "Destroy the group and make it again on all ranks."
                )
            try:
                missing = self._op(row, self._handle)
                if missing != -1:
                    self._wait(row, missing)
            except SyncNormMismatch:
                raise
            except BaseException as error:  # also Ctrl-C: the others must learn that this rank will not come
                self._broken = str(error) or type(error).__name__
                self._leave()
                raise
        return row

    def _wait(self, row: Tensor, missing: int) -> None:
        deadline = time.monotonic() + self._timeout
        while missing >= 0:
            gone = self._gone()
            missing = self._resume(row, self._handle)  # after the look: what a rank did before it went still counts
            if missing >= 0 and gone and (gone := {rank: why for rank, why in self._gone().items() if rank in gone}):
                raise SyncNormPeerLost(f"{_list(gone)} in the middle of an exchange over shared memory.")
            if missing >= 0 and time.monotonic() > deadline:
                waited = {self._members[rank]: _doing(self._processes[rank]) for rank in self._missing()}
                raise SyncNormTimeout(
                    f"{_list(waited)}, and did not come to an exchange within {self._timeout:g} s, the time limit of the "
                    "process group. A rank that skips a layer, evaluates, or left its loop keeps the others waiting."
                )
        if missing == _MISMATCH:
            exchange = self._state[5] - 1
            words = {rank: self._shared.words(place, exchange) for place, rank in enumerate(self._members)}
            raise SyncNormMismatch(
                f"ranks brought rows of different lengths to one exchange: {words} (words by rank). They are in different "
                "layers, one in a forward and another in a backward, or compare at different levels (syncnorm.set_check). "
                "Nothing was changed."
            )

    def _missing(self) -> list[int]:
        """Places of the ranks that have not come to the exchange under way."""
        wanted, places = self._state[5], range(len(self._members))
        return [place for place in places if (self._shared.sequence(place) - wanted) & 0x80000000]  # both wrap around

    def _gone(self) -> dict[int, str]:
        """Those of them that will not come, by global rank, and why."""
        gone = {}
        for place in self._missing():
            if self._shared.left(place):
                gone[self._members[place]] = "has left its process group"
            elif look(self._processes[place][0])[1] != self._processes[place][1]:
                gone[self._members[place]] = f"is gone (process {self._processes[place][0]} has died)"
        return gone


def _doing(process: Process) -> str:
    stopped = look(process[0])[0] in ("T", "t")
    return f"{'is stopped' if stopped else 'is alive'} (process {process[0]})"


def _list(ranks: dict[int, str]) -> str:
    return "; ".join(f"rank {rank} {why}" for rank, why in ranks.items())
