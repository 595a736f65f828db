"""``bench``: what a synchronised layer costs on this machine, in seconds instead of the minutes of ``scripts/bench.py``."""

import math
import os
import platform
import statistics
from dataclasses import dataclass
from typing import Literal

from syncnorm.cli._arguments import Count, Shape
from syncnorm.cli._console import progress, working
from syncnorm.conversion._table import Report, Table

__all__ = ["bench"]


@dataclass(frozen=True)
class _Row:
    """One layer: microseconds of forward and backward, and relative to torch's batch norm, median and middle half."""

    layer: str
    backend: str
    microseconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class _Timed(Report):
    """What was timed, of what, where."""

    machine: str
    of: str
    one_process: tuple[_Row, ...]
    processes: tuple[_Row, ...]
    ranks: int

    def parts(self) -> list[str | Table]:
        header = ("layer", "by", "µs", "of torch's", "middle half")
        parts: list[str | Table] = [self.machine, f"forward and backward of {self.of}"]
        parts += ["in one process, all but the wire", Table(header, _cells(self.one_process))]
        if self.processes:
            parts += [f"on each of {self.ranks} processes of this machine", Table(header, _cells(self.processes))]
        return parts


def bench(
    *,
    shape: Shape = (32, 64, 28, 28),
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ranks: Count = 2,
    rounds: Count = 15,
    threads: Count = 1,
) -> Report:
    """Time synchronised batch norm on this machine, against torch's batch norm.

    Every kernel backend that serves, in one process and over several, on the CPU; scripts/bench.py of the sources times
    more, and scripts/gpu_check.py a GPU. A layer whose result is wrong is not timed. Ratios are medians of pairs of one
    round; 0.5 is half of the time.

    Args:
        shape: Of the input, channels in dim 1.
        dtype: Of the input.
        ranks: Number of processes; 1 leaves out that part.
        rounds: Every layer is timed once a round.
        threads: Threads of each process.
    """
    import torch
    from torch import nn

    from syncnorm import __version__
    from syncnorm.cli._bench_ranks import layer_times
    from syncnorm.diagnostics._timing import Times, interleave, refuse_if_wrong, serving, step, tensor, walk
    from syncnorm.modules import GroupNorm
    from syncnorm.testing import run_ranks

    if not 2 <= len(shape) <= 5 or min(shape) < 1 or shape[0] < 2:
        raise ValueError(f"--shape must be 2 to 5 sizes from 1 with a batch of at least 2, got {list(shape)}.")
    if rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {rounds}: one says nothing of the spread.")
    torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    x, grad = tensor(shape, kind), tensor(shape, kind)
    base = "torch's batch norm"
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[max(len(shape) - 3, 0)](shape[1])
    steps = {base: step(plain, x, grad)}
    for backend in serving(kind):
        steps[f"SyncBatchNorm {backend}"] = step(walk(shape[1], backend), x, grad)
        refuse_if_wrong(steps[base](), steps[f"SyncBatchNorm {backend}"](), x, grad)
    if len(shape) > 2:
        steps["GroupNorm auto"] = step(GroupNorm(shape[1], math.gcd(32, shape[1]), dtype=kind), x, grad)
    with progress("timing", rounds + 2) as advance:
        times = interleave(steps, rounds, advance)
    over: Times = {}
    if ranks > 1:
        with working(f"timing {ranks} processes"):
            over = run_ranks(layer_times, ranks, shape, kind, rounds, threads, timeout=300)[0]
        over = {
            {"local": base, "shm": "SyncBatchNorm shared memory", "collective": "SyncBatchNorm gloo"}[n]: t
            for n, t in over.items()
        }
    machine = (
        f"syncnorm {__version__}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}; load {os.getloadavg()[0]:.1f}"
    )
    of = f"{list(shape)}, {dtype}, {threads} thread{'s' * (threads > 1)}, medians of {rounds} rounds"
    return _Timed(machine, of, _rows(times, base), _rows(over, base), ranks)


def _rows(times: dict[str, list[float]], base: str) -> tuple[_Row, ...]:
    from syncnorm.diagnostics._timing import spread

    rows = []
    for name, seconds in times.items():
        layer, _, by = (name, "", "") if name == base else name.partition(" ")
        ratio = spread(times, name, base)
        microseconds = round(statistics.median(seconds) * 1e6, 1)
        rows.append(
            _Row(layer, by, microseconds, *(round(value, 3) for value in (ratio.median, ratio.low, ratio.high)))
        )
    return tuple(rows)


def _cells(rows: tuple[_Row, ...]) -> list[tuple[str, ...]]:
    return [
        (row.layer, row.backend, f"{row.microseconds:.0f}", f"{row.ratio:.2f}", f"{row.low:.2f}–{row.high:.2f}")
        for row in rows
    ]
