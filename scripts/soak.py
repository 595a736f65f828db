"""Trains for minutes on end, and looks whether memory, open files or the ranks' buffers drift.

    python scripts/soak.py --minutes 5             # 30 before a release
    python scripts/soak.py --minutes 1 --ranks 3 --watch 10

Steps of a small DDP model over ranks whose batches are uneven and in turn empty, with an input refused and a checkpoint now
and then; after them, runs in which a rank is killed. Ends with 1 if, after a warm-up, resident memory grew by more than 2 MiB
or open files by any on some rank, an audit found a difference, or a killed run left a process or a socket behind.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.testing import inject, run_ranks

MIB = 2**20
GROWTH = 2.0  # MiB
WARM_UP = 0.25  # of the time, and 400 steps at least: allocator, threads of autograd, group, width of rows
LOOK = 50  # steps between two looks
NORMS = 3


def train(seconds: float, patience: float | None) -> dict[str, Any]:
    """Steps for ``seconds``; what was seen on the way."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    syncnorm.set_watch(patience)
    torch.manual_seed(0)
    body = nn.Sequential(*[m for _ in range(NORMS) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())])
    model = DistributedDataParallel(nn.Sequential(syncnorm.convert(body), nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    start, step, seen = time.monotonic(), 0, []
    running = torch.ones(1)
    while running:
        step += 1
        samples = 0 if step % (ranks + 3) == rank else 3 + rank
        x = torch.randn(samples, 16, generator=generator)
        optimizer.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if step % 10 == 0 else model(x)
        (y.pow(2).sum() / ranks).backward()
        optimizer.step()
        if step % LOOK == 0:
            refuse(model.module[0], rank)
            syncnorm.audit(model)
            seen.append((time.monotonic() - start, *look()))
            running = torch.tensor([float(time.monotonic() - start < seconds or len(seen) < 10)])
            dist.broadcast(running, 0)  # all end at the same step
            if rank == 0:
                progress(seen[-1][0] / seconds if running else 1.0, f"{step} steps, {seen[-1][1] / MIB:.1f} MiB")
    return {"steps": step, "seconds": time.monotonic() - start, "seen": seen}


def refuse(body: nn.Module, rank: int) -> None:
    """An input that one rank refuses: all raise, and go on."""
    try:
        with inject(body, "bad_input", layer="1", rank=1):
            body(torch.randn(4, 16))
    except (ValueError, syncnorm.SyncNormMismatch):
        return
    raise AssertionError(f"rank {rank} did not hear of an input that was refused")


def look() -> tuple[int, int]:
    """Bytes of resident memory, and open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir()))


_said = -1


def progress(share: float, text: str) -> None:
    """A bar on a terminal, a line for each tenth elsewhere."""
    global _said
    share = min(share, 1.0)
    line = f"[{'█' * int(24 * share):·<24}] {share:4.0%} {text}"
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)
    elif int(share * 10) != _said:
        print(line, file=sys.stderr, flush=True)
    _said = int(share * 10)


def drift(of_rank: dict[str, Any]) -> dict[str, float]:
    """Growth after the warm-up: median of the last fifth against the median of the first fifth behind it."""
    seen = [s for s in of_rank["seen"][7:] if s[0] >= WARM_UP * of_rank["seconds"]]
    fifth = max(len(seen) // 5, 1)
    first, last = seen[:fifth], seen[-fifth:]
    return {
        "memory_mib": (statistics.median(s[1] for s in last) - statistics.median(s[1] for s in first)) / MIB,
        "files": max(s[2] for s in last) - max(s[2] for s in first),
    }


def lose_a_rank() -> str:
    syncnorm.set_watch(20.0)
    layer = syncnorm.SyncBatchNorm1d(4)
    layer(torch.randn(3, 4))
    try:
        with inject(layer, "kill", rank=1):
            layer(torch.randn(3, 4))
    except syncnorm.SyncNormPeerLost as error:
        return str(error)
    return ""


def cycles(number: int) -> tuple[int, int]:
    """Start and lose ranks again and again; processes and sockets that are left in the end."""
    before: tuple[int, int] | None = None
    for done in range(number):
        text, _ = run_ranks(lose_a_rank, 2, timeout=60, lost=[1])
        if "ranks [1] are gone" not in text:
            raise RuntimeError(f"a killed rank was not named: {text!r}")
        before = before or (descendants(), sockets())  # the first run starts the server that the ranks are forked from
        progress((done + 1) / number, f"{done + 1} runs with a killed rank")
    assert before is not None
    return descendants() - before[0], sockets() - before[1]


def descendants() -> int:
    """Processes that this one has started, or that those have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return len(ours) - 1


def sockets() -> int:
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(path))
    return sum("socket:" in link for link in links)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="watch over the exchanges")
    parser.add_argument(
        "--cycles", type=int, default=10, help="runs with a killed rank (default 10; 50 before a release)"
    )
    parser.add_argument("--json", type=Path, help="write what was seen to this file")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/statm").exists():
        parser.error("memory and open files are read from /proc, which this system does not have")
    seconds = 60 * options.minutes
    found = run_ranks(train, options.ranks, seconds, options.watch, timeout=seconds + 120, group_timeout=60)
    failed = False
    for rank, of_rank in enumerate(found):
        steps, grown = of_rank["steps"], drift(of_rank)
        of_rank["drift"] = grown
        bad = grown["memory_mib"] > GROWTH or grown["files"] > 0
        failed |= bad
        print(
            f"rank {rank}: {steps} steps, {2 * NORMS * steps} exchanges, {len(of_rank['seen'])} audits clean; after the "
            f"warm-up memory {grown['memory_mib']:+.2f} MiB, open files {grown['files']:+.0f}{'  TOO MUCH' if bad else ''}"
        )
    if options.cycles:
        processes, left = cycles(options.cycles)
        failed |= processes > 0 or left > 0
        print(f"{options.cycles} runs with a killed rank: {processes} processes and {left} sockets left")
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    print("FAILED" if failed else "passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
