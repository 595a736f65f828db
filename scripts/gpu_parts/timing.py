"""Timing on a device: calls recorded as CUDA graphs, replayed in turns, medians of what events measure."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Case = Callable[[], object]


def medians(cases: dict[str, Case], device: str, rounds: int = 25, seconds: float = 3.0) -> dict[str, float]:
    """Seconds per call of each case that runs; why another does not is printed. The cases take turns in every round."""
    runs = {}
    rounds = 3 if device == "cpu" else rounds  # a dry run
    for name, case in cases.items():
        run = _prepared(case, device, name)
        if run is not None:
            runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.monotonic() + seconds
    for round_number in range(rounds):
        if round_number > 4 and time.monotonic() > deadline:
            break
        for name, run in runs.items():
            times[name].append(run())
    return {name: statistics.median(times[name][2:]) for name in runs}


def _prepared(case: Case, device: str, name: str) -> Callable[[], float] | None:
    """A function that runs ``case`` often enough to be measured and gives the seconds of one call."""
    try:
        case()
        return (lambda: _clock(case)) if device == "cpu" else _captured(case)
    except Exception as error:  # a peer that cannot run or cannot be captured is no reason to stop
        if device != "cpu":  # torch.cuda.graph leaves its stream in force where its capture was broken off
            torch.cuda.set_stream(torch.cuda.default_stream())
        print(
            f"  {name} was not timed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}", flush=True
        )
        return None


def _captured(case: Case) -> Callable[[], float]:
    for _ in range(2):
        case()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    case()
    end.record()
    end.synchronize()
    calls = max(1, min(20, int(2.0 / max(begin.elapsed_time(end), 1e-3))))  # about 2 ms in a graph
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            case()

    def run() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return run


def _clock(case: Case) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool = False) -> Tensor:
    """Random data: constants flatter a memory-bound kernel."""
    x = torch.randn(shape, dtype=torch.float32, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def copy_seconds(x: Tensor, device: str) -> float:
    """Of ``dst.copy_(src)`` on a tensor like ``x``: two passes over memory, by which all bandwidths are judged."""
    other = torch.empty_like(x)
    return medians({"copy": lambda: other.copy_(x)}, device)["copy"]
