"""Ranks that are threads of this process, over torch's threaded process group: thousands of small cases in a minute.

Only for what needs no process of its own; a rank that raises ends the pool, as it would leave the others waiting.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    ThreadLocalWorld,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

if not hasattr(ThreadLocalWorld, "comms"):  # torch 2.11 asks for them when a group is destroyed
    ThreadLocalWorld.comms = []


class ThreadRanks:
    """``ranks`` threads that form a process group; :meth:`run` calls a function on each.

    Attributes:
        failed: Whether a rank has raised: the others are out of step with it since.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.failed = ranks, False
        self._jobs: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(ranks)]
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._store = dist.HashStore()
        self._threads = [threading.Thread(target=self._serve, args=(rank,), daemon=True) for rank in range(ranks)]
        for thread in self._threads:
            thread.start()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``fn(*args)`` returns on each rank, by rank; raises what the first rank raised."""
        for jobs in self._jobs:
            jobs.put((fn, args))
        answers = [self._answers.get(timeout=60) for _ in range(self.ranks)]
        errors = [value for _, ok, value in answers if not ok and not isinstance(value, SystemExit)]
        if errors:
            self.failed = True
            ProcessLocalGroup.reset()
            raise errors[0]
        return [value for _, _, value in sorted(answers, key=lambda answer: answer[0])]

    def close(self) -> None:
        for jobs in self._jobs:
            jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=60)

    def _serve(self, rank: int) -> None:
        dist.init_process_group("threaded", store=self._store, rank=rank, world_size=self.ranks)
        while (job := self._jobs[rank].get()) is not None:
            fn, args = job
            try:
                self._answers.put((rank, True, fn(*args)))
            except BaseException as error:
                ProcessLocalGroup.exception_handle(error)  # wakes those who wait for this rank
                self._answers.put((rank, False, error))
        dist.destroy_process_group()


@contextmanager
def thread_ranks() -> Iterator[Callable[[int], ThreadRanks]]:
    """A source of pools, by their number of ranks; each is made once, again after a failure, and closed at the end."""
    isolated = torch._C._distributed_c10d._set_thread_isolation_mode
    isolated(True)  # each thread has a registry of groups of its own
    _install_threaded_pg()
    pools: dict[int, ThreadRanks] = {}

    def pool(ranks: int) -> ThreadRanks:
        if ranks in pools and pools[ranks].failed:
            pools.pop(ranks).close()
        if ranks not in pools:
            pools[ranks] = ThreadRanks(ranks)
        return pools[ranks]

    try:
        yield pool
    finally:
        for each in pools.values():
            each.close()
        _uninstall_threaded_pg()
        isolated(False)
