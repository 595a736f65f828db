"""What ``scripts/bench.py`` times between processes: the wire alone, and a layer over it. Wall clock, on the first rank."""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from bench_cases import LAYOUTS, Row
from torch import Tensor, nn

import syncnorm
from syncnorm.cli._bench_ranks import WAYS, interleave_ranks, layers, ways
from syncnorm.core.moments import Moments, to_sums
from syncnorm.diagnostics._timing import Times, spread, step, tensor
from syncnorm.distributed.exchange import exchange_moments
from syncnorm.distributed.groups import GroupSpec, resolve
from syncnorm.distributed.ledger import begin_call
from syncnorm.distributed.wire import sum_row
from syncnorm.testing import run_ranks


def exchange_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Moments of all ranks by each way, checked and not, against a bare all-reduce of as many words."""
    for ranks in (2, 4):
        for channels in (64, 1024):
            times = _first(ranks, exchange_times, channels, 20 * arguments.rounds)
            for way in (w for w in WAYS if f"{w} inline" in times):
                yield {
                    "ranks": ranks, "channels": channels, "way": "gloo" if way == "collective" else way,
                    "bare all_reduce µs": f"{statistics.median(times['bare']) * 1e6:.0f}",
                    "unchecked µs": f"{statistics.median(times[f'{way} off']) * 1e6:.1f}",
                    "checked µs": f"{statistics.median(times[f'{way} inline']) * 1e6:.1f}",
                    "checked / bare": str(spread(times, f"{way} inline", "bare")),
                    "row alone µs": f"{statistics.median(times[f'{way} row']) * 1e6:.1f}",
                }  # fmt: skip


def rank_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """The layer by each way, and a textbook one of plain operations, against torch's on every rank for itself."""
    for ranks in (2, 4):
        for dtype in arguments.dtypes:
            for shape in arguments.shapes:
                for layout in LAYOUTS:
                    times = _first(ranks, layer_times, shape, dtype, layout, max(arguments.rounds // 2, 7))
                    row: dict[str, Any] = {
                        "ranks": ranks,
                        "dtype": str(dtype).removeprefix("torch."),
                        "shape": str(shape),
                        "layout": layout,
                    }
                    row["local nn.BatchNorm2d µs"] = f"{statistics.median(times['local']) * 1e6:.0f}"
                    row["shm"] = str(spread(times, "shm", "local")) if "shm" in times else "–"
                    row["gloo"] = str(spread(times, "collective", "local"))
                    row["textbook, gloo"] = str(spread(times, "textbook", "local"))
                    row["textbook / ours, gloo"] = str(spread(times, "textbook", "collective"))
                    yield row


def _first(ranks: int, function: Callable[..., Times], *args: Any) -> Times:
    times: Times = run_ranks(function, ranks, *args, timeout=600)[0]
    return times


def exchange_times(channels: int, rounds: int) -> Times:
    """Seconds by case, on one rank."""
    group, site, x = resolve(GroupSpec()), syncnorm.SyncBatchNorm1d(channels), torch.randn(4, channels)
    local = Moments(4.0, x.double().mean(0), x.double().var(0, correction=0) * 4)
    row = to_sums(local)
    cases: dict[str, Callable[[], object]] = {"bare": lambda: dist.all_reduce(row.clone())}
    for way in ways():
        for check in ("off", "inline"):

            def run(way: str = way, check: str = check) -> None:
                exchange_moments(local, group, needs_backward=True, call=begin_call(site, group, x))

            cases[f"{way} {check}"] = run

        cases[f"{way} row"] = lambda: sum_row(row.clone(), group)
    return interleave_ranks(cases, rounds)


def layer_times(shape: tuple[int, ...], dtype: torch.dtype, layout: str, rounds: int) -> Times:
    """Seconds by case, on one rank."""
    x, grad = (tensor(shape, dtype, LAYOUTS[layout]) for _ in range(2))
    return interleave_ranks({**layers(x, grad), "textbook": step(Textbook(shape[1]), x, grad)}, rounds)


class Textbook(nn.Module):
    """SyncBatchNorm as one would write it down: mean and mean square of all ranks, and autograd for the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean, self.running_var = torch.zeros(channels), torch.ones(channels)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.tensor([x.numel() / x.size(1)])
        sums = _AllReduce.apply(torch.cat([count, x.float().sum((0, 2, 3)), x.float().square().sum((0, 2, 3))]))
        count, mean, square = sums[0], *(sums[1:].view(2, -1) / sums[0]).unbind(0)
        var = square - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * count / (count - 1), 0.1)
        scale = (var + 1e-5).rsqrt() * self.weight
        y = x.float() * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return y.to(x.dtype)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
