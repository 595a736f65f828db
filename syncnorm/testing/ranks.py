"""Run a function on several ranks over gloo, started from a process that has torch loaded already.

A launch from this forkserver takes a few tenths of a second, where ``spawn`` imports torch anew in 5 to 20.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankError", "run_ranks"]

_PRELOAD = ["torch", "torch._dynamo", "torch.distributed", "syncnorm.testing.ranks"]


class RankError(RuntimeError):
    """A rank raised, died or did not finish in time. The text has each rank's own traceback.

    Attributes:
        errors: What each failed rank reported, by rank.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
        self.errors = errors


def run_ranks(
    fn: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60.0,
    group_timeout: float = 30.0,
    lost: Collection[int] = (),
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` in ``ranks`` processes that form a gloo process group.

    Args:
        fn: Importable (defined at the top of a module): it is sent by name. Finds its rank with
            ``torch.distributed.get_rank()``.
        ranks: Number of processes.
        *args: Picklable arguments, the same for every rank.
        timeout: Seconds until all ranks are killed.
        group_timeout: Seconds after which a collective that waits for a peer fails.
        lost: Ranks that are meant to die, stop or hang: nobody waits for them, and they answer None. The others then end
            without a last meeting.
        **kwargs: As ``args``.

    Returns:
        What ``fn`` returned on each rank, by rank; must be picklable.

    Raises:
        RankError: If any rank raised, died, or was still running at the timeout.
        ValueError: If ``ranks`` is below 1.
    """
    if ranks < 1:
        raise ValueError(f"run_ranks starts at least 1 rank, got ranks={ranks}.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="syncnorm-ranks-") as folder:
        arguments = [(rank, ranks, folder, group_timeout, not lost, fn, args, kwargs) for rank in range(ranks)]
        processes = [
            context.Process(target=_run_rank, args=a) for a in arguments
        ]  # a daemon may have no DataLoader workers
        try:
            for process in processes:
                process.start()
            _wait(processes, [p for rank, p in enumerate(processes) if rank not in lost], timeout)
        except BaseException:  # Ctrl-C, or a function that cannot be sent
            _kill(processes)
            raise
        return _collect(processes, Path(folder), timeout, lost)


def _run_rank(
    rank: int, ranks: int, folder: str, group_timeout: float, meet: bool, fn: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    outcome: tuple[str, Any]
    try:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        timeout = timedelta(seconds=group_timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
        _await_connections(store, rank, ranks)
        outcome = "value", fn(*args, **kwargs)
    except BaseException:
        outcome = "error", traceback.format_exc()
    try:
        told = pickle.dumps(outcome)
    except Exception:
        told = pickle.dumps(("error", f"what the function returned cannot be pickled: {traceback.format_exc()}"))
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(told)
    partial.rename(Path(folder) / f"{rank}.done")
    if not meet:
        os._exit(0)  # what waits for a lost rank would wait on
    if outcome[0] == "value" and dist.is_initialized():
        dist.barrier()  # so that no rank closes its sockets while another still reads from them
        dist.destroy_process_group()


def _await_connections(store: dist.Store, rank: int, ranks: int) -> None:
    """Return when all ranks have their connections.

    ``init_process_group`` returns on one rank while a peer still reads the last bytes of their handshake. If that rank
    ends then and there, the peer fails in ``connectFullMesh`` (one launch in six of a function that raises at once, on
    two loaded cores) and not at what the caller wants to see fail.
    """
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{peer}" for peer in range(ranks)])


def _wait(processes: list[Any], awaited: list[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    running = awaited
    while running and time.monotonic() < deadline:
        finished = wait([p.sentinel for p in running], timeout=max(0.0, deadline - time.monotonic()))
        running = [p for p in running if p.sentinel not in finished]
    _kill(processes if len(awaited) < len(processes) else running)
    for process in processes:
        process.join()


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.pid is not None:  # it was started
            process.kill()
            process.join()


def _collect(processes: list[Any], folder: Path, timeout: float, lost: Collection[int]) -> list[Any]:
    values: list[Any] = []
    errors: dict[int, str] = {}
    for rank, process in enumerate(processes):
        done = folder / f"{rank}.done"
        if rank in lost:
            values.append(None)
            continue
        if not done.exists():
            errors[rank] = f"no result after {timeout:g} s or killed (exit code {process.exitcode})"
            continue
        kind, value = pickle.loads(done.read_bytes())  # written by our own child a moment ago
        if kind == "error":
            errors[rank] = value
        values.append(value)
    if errors:
        raise RankError(errors)
    return values
