"""Times the layers against torch's own and whatever else is installed, and is the one place that times anything.

    python scripts/bench.py                                # every part, the tables of README: about 6 minutes
    python scripts/bench.py layer fused --dtype bfloat16 --threads 2
    python scripts/bench.py --out docs/benchmarks          # also JSON and Markdown

Parts: layer (batch norm by backend), fused (with activation and residual), rows (layer, RMS and group norm), eval (what a
single process pays), memory (what is kept for the backward), exchange (the wire alone), ranks (synchronised over
processes). Every number is the median of ratios within one interleaved run, because the machine is rarely quiet. A layer
whose result is wrong is not timed.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

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

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_cases
import bench_ranks

import syncnorm

PARTS: dict[str, Any] = {
    "layer": bench_cases.layer_rows,
    "fused": bench_cases.fused_rows,
    "rows": bench_cases.row_norm_rows,
    "eval": bench_cases.eval_rows,
    "memory": bench_cases.memory_rows,
    "exchange": bench_ranks.exchange_rows,
    "ranks": bench_ranks.rank_rows,
}
TITLES = {
    "layer": "Batch norm, forward and backward in a group of one",
    "fused": "Batch norm with what follows it, forward and backward",
    "rows": "Row norms, forward and backward",
    "eval": "The module against F.batch_norm: evaluation, and training without a process group",
    "memory": "Bytes kept for the backward, in inputs",
    "exchange": "One exchange between processes on this machine",
    "ranks": "Synchronised batch norm over processes, forward and backward, against nn.BatchNorm2d on each alone",
}

Row = dict[str, Any]


def main() -> int:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts to run (default: all)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="(default: %(default)s)")
    parser.add_argument("--backend", nargs="+", help="kernel backends (default: all that serve)")
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds per row (default: %(default)s)")
    parser.add_argument("--shape", action="append", help="N,C,H,W; repeatable (default: the three of the tables)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of torch's layers, too (minutes)")
    parser.add_argument("--out", type=Path, help="folder for cpu.json and cpu.md")
    arguments = parser.parse_args()
    arguments.dtypes = [getattr(torch, name) for name in arguments.dtype]
    arguments.shapes = [tuple(map(int, text.split(","))) for text in arguments.shape or []] or bench_cases.SHAPES
    head = machine(arguments)
    print(head)
    tables: dict[str, list[Row]] = {}
    for part in arguments.parts or PARTS:
        print(f"\n{TITLES[part]}\n")
        tables[part] = []
        for row in PARTS[part](arguments):
            if not tables[part]:
                print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
            tables[part].append(row)
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    if arguments.out:
        write(arguments.out, head, tables)
    return 0


def machine(arguments: argparse.Namespace) -> str:
    """What the numbers are of."""
    return (
        f"{date.today().isoformat()}, syncnorm {syncnorm.__version__}, torch {torch.__version__}, {processor()}, "
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, medians of {arguments.rounds} interleaved rounds; "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )


def processor() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


def write(folder: Path, head: str, tables: dict[str, list[Row]]) -> None:
    """``cpu.json`` and ``cpu.md``; a part that was not run keeps what stands there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cpu.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    found = {part: {"of": head, "rows": rows} for part, rows in tables.items()}
    merged = {part: {**old, **found}[part] for part in PARTS if part in {**old, **found}}
    path.write_text(json.dumps(merged, indent=1) + "\n")
    lines = ["# Benchmarks on CPU", "", "Written by `python scripts/bench.py --out docs/benchmarks`."]
    for part, table in merged.items():
        header = list(table["rows"][0])
        lines += [
            "",
            f"## {TITLES[part]}",
            "",
            f"{table['of']}.",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
        ]
        lines += ["| " + " | ".join(str(row.get(name, "")) for name in header) + " |" for row in table["rows"]]
    (folder / "cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
