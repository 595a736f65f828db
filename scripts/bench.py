"""Times the layer against torch's own, and is the one place that times anything.

    python scripts/bench.py                          # the table of the README: train step, CPU, float32
    python scripts/bench.py --part eval              # what evaluation and a single process cost over F.batch_norm
    python scripts/bench.py --dtype bfloat16 --threads 2 --backend reference

Every number is a ratio of two medians taken in one interleaved run, because the machine is rarely quiet. A layer whose
result is wrong is not timed. The walk runs in a group of one: what it costs without the wire.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# A fresh 25 MB output costs 6,000 page faults unless malloc may keep it; both sides get the same allocator.
# glibc ignores a larger mmap threshold than 32 MiB.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def pin_allocator() -> None:
    """Start this program again with a malloc that keeps its memory, unless it has been."""
    if not all(os.environ.get(key) == value for key, value in _ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ALLOCATOR})


if __name__ == "__main__":
    pin_allocator()

import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional import sync_batch_norm
from syncnorm.kernels import objections

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (8, 1024, 7, 7)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Issue targets for the medians of the train part, float32.
TARGETS = {"contiguous": 0.75, "channels_last": 1.35}

Case = dict[str, Callable[[], object]]


def main() -> int:
    """Run one part and print its table; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["train", "eval"], default="train")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--backend", help="kernel backend of the walk (default: what backend='auto' takes)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds per row (default: %(default)s)")
    parser.add_argument("--shape", action="append", help="N,C,H,W; repeatable (default: the three of the table)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [tuple(int(n) for n in text.split(",")) for text in arguments.shape] if arguments.shape else SHAPES
    dtype = getattr(torch, arguments.dtype)
    serving = [name for name, reason in objections(torch.empty(2, 2, 2, dtype=dtype)).items() if reason is None]
    backend = arguments.backend or serving[0]
    print(
        f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{arguments.threads} thread(s), {arguments.dtype}, backend {backend}, "
        f"medians of {arguments.rounds} interleaved rounds\n"
    )
    run = train_rows if arguments.part == "train" else eval_rows
    rows = []
    for row in run(shapes, dtype, backend, arguments.rounds):
        if not rows:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        rows.append(row)
        print("| " + " | ".join(str(v) for v in row.values()) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.part == "train":
        for layout, target in TARGETS.items():
            ratio = statistics.median(float(row["ratio"]) for row in rows if row["layout"] == layout)
            note = f" (target {target} at float32)" if dtype == torch.float32 else ""
            print(f"\nmedian ratio, {layout}: {ratio:.2f}{note}", end="")
        print()
    return 0


def train_rows(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str, rounds: int
) -> Iterator[dict[str, str]]:
    """Forward and backward of the walk in a group of one against ``nn.BatchNorm2d``."""
    for shape in shapes:
        for layout, memory_format in LAYOUTS.items():
            x, grad = (tensor(shape, dtype, memory_format) for _ in range(2))
            theirs, ours = nn.BatchNorm2d(shape[1]), syncnorm.SyncBatchNorm2d(shape[1])
            step_theirs = step(theirs, x, grad)
            step_ours = step(lambda x, layer=ours: walk(layer, x, backend), x, grad)
            refuse_if_wrong(step_theirs(), step_ours(), x, grad)
            y = torch.empty_like(x)
            times = interleave({"copy": lambda x=x, y=y: y.copy_(x), "theirs": step_theirs, "ours": step_ours}, rounds)
            ratios = [b / a for a, b in zip(times["theirs"], times["ours"], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            copy, ours_us = (statistics.median(times[key]) * 1e6 for key in ("copy", "ours"))
            moved = 2 * x.numel() * x.element_size() / 1e6
            yield {
                "shape": str(shape),
                "layout": layout,
                "dtype": str(dtype).removeprefix("torch."),
                "nn.BatchNorm2d µs": f"{statistics.median(times['theirs']) * 1e6:.0f}",
                "ours µs": f"{ours_us:.0f}",
                "ratio": f"{ratio:.2f}",
                "p25–p75": f"{low:.2f}–{high:.2f}",
                "copies": f"{ours_us / copy:.1f}",
                "copy MB": f"{moved:.1f}",
                "copy GB/s": f"{moved / copy * 1e3:.1f}",
            }


def eval_rows(shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str, rounds: int) -> Iterator[dict[str, str]]:
    """The module against ``F.batch_norm``: evaluation, and training without a process group."""
    for shape in shapes:
        for mode in ("eval", "train, one process"):
            x = tensor(shape, dtype, torch.contiguous_format)
            layer = syncnorm.SyncBatchNorm2d(shape[1]).train(mode != "eval")
            buffers = [layer.running_mean.clone(), layer.running_var.clone()]

            def theirs(x: Tensor = x, layer: nn.BatchNorm2d = layer, buffers: list[Tensor] = buffers) -> Tensor:
                affine = layer.weight, layer.bias
                return nn.functional.batch_norm(x, *buffers, *affine, layer.training, 0.1, layer.eps)

            with torch.no_grad():
                if not torch.equal(theirs(), layer(x)):
                    raise SystemExit(f"not timed: {mode} differs from F.batch_norm at {shape}")
                times = interleave({"theirs": theirs, "ours": lambda x=x, layer=layer: layer(x)}, rounds)
            ratio = statistics.median(b / a for a, b in zip(times["theirs"], times["ours"], strict=True))
            extra = statistics.median(times["ours"]) - statistics.median(times["theirs"])
            yield {
                "shape": str(shape),
                "mode": mode,
                "F.batch_norm µs": f"{statistics.median(times['theirs']) * 1e6:.0f}",
                "ratio": f"{ratio:.3f}",
                "difference µs": f"{extra * 1e6:.1f}",
            }


def tensor(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Random data: constant tensors flatter a memory-bound kernel."""
    return torch.randn(shape).to(dtype).to(memory_format=memory_format)


def walk(layer: nn.BatchNorm2d, x: Tensor, backend: str) -> Tensor:
    """The synchronised path in a group of one, where the module itself would leave the work to torch."""
    return sync_batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=True, momentum=layer.momentum,
        eps=layer.eps, num_batches_tracked=layer.num_batches_tracked, group=LOCAL, backend=backend,
    )  # fmt: skip


def step(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        y = layer(leaf)
        y.backward(grad)
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    return run


def refuse_if_wrong(theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], x: Tensor, grad: Tensor) -> None:
    """Exit unless output and input gradient agree with float64 about as well as torch's do."""
    leaf = x.double().requires_grad_()
    y = nn.functional.batch_norm(leaf, None, None, None, None, True, 0.0, 1e-5)
    (dx,) = torch.autograd.grad(y, leaf, grad.double())
    for name, exact, a, b in zip(("output", "input gradient"), (y, dx), theirs, ours, strict=True):
        bound = 2 * (a - exact).abs().max() + 4 * torch.finfo(x.dtype).eps * exact.abs().max()
        if (b - exact).abs().max() > bound:
            raise SystemExit(f"not timed: {name} is off by {(b - exact).abs().max():.2e}, allowed {bound:.2e}")


def interleave(cases: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds per call: every case once a round, after two rounds of warm-up."""
    # On one thread its own CPU time, which other processes do not lengthen.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in cases}
    progress = sys.stderr.isatty()
    for round_number in range(rounds + 2):
        for name, run in cases.items():
            start = clock()
            run()
            if round_number >= 2:
                times[name].append(clock() - start)
        if progress:
            print(f"\r  round {round_number + 1}/{rounds + 2} ", end="", file=sys.stderr)
    if progress:
        print("\r" + " " * 24 + "\r", end="", file=sys.stderr)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
