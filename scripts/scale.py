"""What synchronisation costs as ranks are added: messages and bytes counted, time predicted. No cluster needed.

    python scripts/scale.py                                  a ResNet-50, 2 to 1,024 ranks
    python scripts/scale.py --model my.pkg:make --input 8,3,128,128 --latency-us 15 --bandwidth-gb 20

One process plays one of R ranks: torch's fake process group carries nothing, and every sum comes back R times as large, as
if all ranks held the same batch. Each exchange of one training step is counted with its payload. The prediction takes

    t(R) = ceil(log2 R) · latency + 2 (R - 1)/R · bytes / bandwidth

for an all-reduce, with both measured between two ranks of this machine over gloo unless they are given: a model, good for
the shape of the curve, and no replacement for a run on the real network.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncnorm
from syncnorm.testing import run_ranks

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def resnet50() -> nn.Module:
    """The 53 batch norms of a ResNet-50 and its convolutions, in order; shortcuts are left out of the sum."""
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers += [*_conv(channels, width, 1), *_conv(width, width, 3, stride), *_conv(width, 4 * width, 1)]
            if not block:
                layers += _conv(4 * width, 4 * width, 1)  # stands for the shortcut's: the same width
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def _conv(channels: int, width: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


# ------------------------------------------------------------------------------------------------------------- the counting


class Exchange(NamedTuple):
    """One collective, as a rank sees it: whether it is a gather, and the bytes that it hands over."""

    gather: bool
    payload: int

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends at least: around a ring, or by halving and doubling."""
        return (ranks - 1) * self.payload if self.gather else 2 * (ranks - 1) / ranks * self.payload


def count(model: nn.Module, x: Tensor, ranks: int) -> list[Exchange]:
    """The exchanges of one training step on one of ``ranks`` ranks, in order."""
    with fake_ranks(ranks) as exchanges:
        _step(model, x)  # the first step also agrees on groups and row widths
        exchanges.clear()
        _step(model, x)
        return list(exchanges)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[list[Exchange]]:
    """Play rank 0 of ``ranks``, all with the same data; yields its exchanges as they are made."""
    exchanges: list[Exchange] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reduced(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        exchanges.append(Exchange(False, tensor.numel() * tensor.element_size()))
        work = all_reduce(tensor, *args, **kwargs)
        tensor.mul_(ranks)
        return work

    def gathered(rows: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        exchanges.append(Exchange(True, tensor.numel() * tensor.element_size()))
        work = all_gather(rows, tensor, *args, **kwargs)
        for row in rows:
            row.copy_(tensor)
        return work

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    dist.all_reduce, dist.all_gather = reduced, gathered
    try:
        yield exchanges
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        dist.destroy_process_group()


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    output = model(x)
    (output if isinstance(output, Tensor) else next(iter(output))).float().square().mean().backward()


# ----------------------------------------------------------------------------------------------------------- the prediction


def predict(exchanges: list[Exchange], ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of one step's exchanges; ``latency`` in seconds for two ranks, ``bandwidth`` in bytes a second."""
    rounds = math.ceil(math.log2(ranks))
    return sum(rounds * latency + exchange.sent(ranks) / bandwidth for exchange in exchanges)


def measure(words: int = 2050, large: int = 1 << 19, rounds: int = 40) -> dict[str, float]:
    """Latency in seconds and bandwidth in bytes a second between two ranks of this machine over gloo, and a row over shm.

    Medians of ``rounds``; the bandwidth is that of the bytes a rank sends for ``large`` words beyond those for ``words``.
    """
    return run_ranks(_measure, 2, words, large, rounds)[0]


def _measure(words: int, large: int, rounds: int) -> dict[str, float]:
    from syncnorm.distributed import GroupSpec, resolve
    from syncnorm.distributed.wire import describe, sum_row

    group = resolve(GroupSpec())
    small, big = (torch.zeros(n, dtype=torch.float64) for n in (words, large))
    times: dict[str, list[float]] = {"small": [], "big": [], "wire": []}
    for _ in range(rounds):
        for name, call in (
            ("small", lambda: dist.all_reduce(small)),
            ("big", lambda: dist.all_reduce(big)),
            ("wire", lambda: sum_row(small, group)),
        ):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(1 if name == "big" else 10):
                call()
            times[name].append((time.perf_counter() - began) / (1 if name == "big" else 10))
    latency, transfer, wire = (statistics.median(times[name]) for name in ("small", "big", "wire"))
    out = {"latency": latency, "bandwidth": 8 * (large - words) / max(transfer - latency, 1e-9)}
    return out | ({"shm": wire} if describe(group.name, "cpu").startswith("shm") else {})


# ---------------------------------------------------------------------------------------------------------------- the table


def main() -> None:
    """Count, predict, print; as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="pkg.mod:factory, called without arguments; default a ResNet-50")
    parser.add_argument("--input", default="2,3,64,64", help="its input, for one rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--latency-us", type=float, help="of an all-reduce of a small row between two ranks")
    parser.add_argument("--bandwidth-gb", type=float, help="gigabytes a second that one rank can send")
    parser.add_argument("--step-ms", type=float, help="a step without synchronisation, to set the cost against")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    if min(arguments.ranks) < 2:
        parser.error("--ranks are at least 2: a lone rank exchanges nothing")
    torch.manual_seed(0)
    model = syncnorm.convert(_factory(arguments.model)())
    x = torch.randn(*(int(n) for n in arguments.input.split(",")))
    wire = {"latency": (arguments.latency_us or 0) / 1e6, "bandwidth": (arguments.bandwidth_gb or 0) * 1e9}
    given = {name: value for name, value in wire.items() if value}
    if len(given) < 2:
        wire = measure() | given
    where = {0: "measured here between two ranks over gloo", 1: "one given, one measured here", 2: "given"}[len(given)]
    rows = []
    for done, ranks in enumerate(arguments.ranks):
        _progress(done, len(arguments.ranks), f"{ranks} ranks")
        exchanges = count(model, x, ranks)
        rows.append(
            {
                "ranks": ranks,
                "exchanges": len(exchanges),
                "bytes": sum(exchange.payload for exchange in exchanges),
                "sent": sum(exchange.sent(ranks) for exchange in exchanges),
                "if_gathered": sum(exchange.payload * (ranks - 1) for exchange in exchanges),
                "seconds": predict(exchanges, ranks, wire["latency"], wire["bandwidth"]),
            }
        )
    _progress(len(rows), len(rows), "")
    _print(rows, wire, where, arguments.step_ms)
    if arguments.json:
        arguments.json.write_text(json.dumps({"wire": wire, "rows": rows}, indent=1) + "\n")


def _factory(path: str | None) -> Callable[[], nn.Module]:
    if path is None:
        return resnet50
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    factory: Callable[[], nn.Module] = getattr(importlib.import_module(module), name)
    return factory


def _print(rows: list[dict[str, float]], wire: dict[str, float], where: str, step_ms: float | None) -> None:
    print(f"latency {wire['latency'] * 1e6:.0f} µs, bandwidth {wire['bandwidth'] / 1e9:.2f} GB/s, {where}")
    if "shm" in wire:
        print(f"ranks of one host share memory here: {wire['shm'] * 1e6:.0f} µs for a row of 2,050 words")
    print(
        "\n| ranks | exchanges | row bytes | bytes sent by a rank | had it been a gather | predicted ms a step |",
        end="",
    )
    print(" of the step |" if step_ms else "")
    print("|---|---|---|---|---|---|" + ("---|" if step_ms else ""))
    for row in rows:
        share = f" {row['seconds'] * 1e5 / step_ms:.1f} % |" if step_ms else ""
        print(
            f"| {row['ranks']:,} | {row['exchanges']} | {row['bytes']:,} | {row['sent']:,.0f} | {row['if_gathered']:,} "
            f"| {row['seconds'] * 1e3:.2f} |{share}"
        )


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        bar = "█" * (20 * done // total)
        print(
            f"\r[{bar:<20}] {done}/{total} {what:<12}",
            end="" if done < total else "\r" + " " * 50 + "\r",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
