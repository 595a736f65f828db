"""What the kernels' machine code says of a GPU that is not here: whether memory or instructions would bound each of them.

    python scripts/gpu_model.py                  # the H100 (SXM); needs triton and this checkout, no GPU
    python scripts/gpu_model.py --dtype float32

Each kernel is compiled ahead of time for the shapes that ``gpu_check.py`` measures. From registers and shared memory follow
how many programs a multiprocessor holds, from these the bytes that can be on their way to it at once (a copy at 3 TB/s and
700 ns asks 8 KiB for what is read, a pure reading 16 KiB), and from the instructions, of loops as often as they run, the
time to issue them at one an SM quarter and clock. The larger of that and the memory's time is a bound and no prediction:
it knows no latency, no cache and no launch. It finds what cannot be fast, before anyone has a GPU.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

MULTIPROCESSORS, CLOCK_GHZ, GB_PER_SECOND = 132, 1.7, 3000.0  # an H100's; a copy reaches as much of its 3,350 GB/s
REGISTERS, SHARED, WARPS = 65536, 228 << 10, 64  # of a multiprocessor
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)([^;]*);")


class Code(NamedTuple):
    """What a compiled kernel asks of a multiprocessor.

    Attributes:
        registers: A thread's.
        programs: How many fit at once.
        once: Instructions outside of the largest loop.
        loop: Instructions of the largest loop.
    """

    registers: int
    programs: int
    once: int
    loop: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    from tests import triton_ahead as ahead

    cases: dict[str, Callable[[], None]] = {}
    for n, c, s in ((64, 256, 3136), (16, 64, 50176), (32, 2048, 49)):
        for last in (False, True):
            name = f"({n}, {c}, {round(s**0.5)}²) {'NHWC' if last else 'NCHW'}"
            cases[name] = lambda n=n, c=c, s=s, last=last: ahead.batch_primitives(dtype, last, n, c, s)
    for last in (False, True):
        cases[f"groups {'NHWC' if last else 'NCHW'}"] = lambda last=last: ahead.group_primitives(dtype, last)
    for features in (1024, 4096, 8192, 16384):
        cases[f"rows of {features}"] = lambda features=features: ahead.row_primitives(dtype, features, True)
    print("| case | kernel | registers | at once | KiB on the way | issue µs | memory µs | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for name, case in cases.items():
        with ahead.recorded() as launches:
            case()
        for launch in launches:
            if "ALIGN" in launch.constants:
                print(f"| {name} | {_row(launch, ahead.compiled(launch, 90))} |", flush=True)
    return 0


def _row(launch: Any, binary: Any) -> str:
    code, constants = _code(binary, launch.warps), launch.constants
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    size = arguments["x" if "x" in arguments else "h"].numel()
    large = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.numel() == size}
    written = {"y", "dx", "dresidual"} | ({"h"} if "y" in arguments else set())
    tile = constants["ROWS"] * constants["COLS"]
    ahead = max(1, constants.get("STAGES", 1) - 1)
    width = launch.arguments[0].element_size()
    on_the_way = code.programs * tile * width * len(large.keys() - written) * ahead / 1024
    issued = launch.programs * launch.warps * (code.once + code.loop * _turns(launch, arguments, size / tile))
    issue = issued / (4 * MULTIPROCESSORS) / CLOCK_GHZ / 1e3
    memory = sum(t.numel() * t.element_size() for t in large.values()) / GB_PER_SECOND / 1e3
    activation = {1: " relu", 3: " silu", 4: " gelu"}.get(constants.get("ACTIVATION", 0), "")
    bound = "**instructions**" if issue > memory else "memory"
    return (
        f"{launch.kernel.__name__.removesuffix('_kernel')}{activation} | {code.registers} | {code.programs} | {on_the_way:.0f} "
        f"| {issue:.1f} | {memory:.1f} | {bound}"
    )


def _turns(launch: Any, arguments: dict[str, Any], tiles: float) -> int:
    """How often a program runs its loop."""
    if "steps" in arguments:
        return int(arguments["steps"])
    if "splits" in arguments:
        first = launch.kernel.__name__ == "moments_kernel"  # whose first tile comes before
        return -(-arguments["tiles"] // arguments["splits"]) - first
    return math.ceil(tiles / launch.programs)


def _code(binary: Any, warps: int) -> Code:
    from tests.triton_ahead import resources, triton

    registers = resources(binary)["REG"]
    fit = min(WARPS, REGISTERS // (-(-registers * 32 // 256) * 256)) // warps
    programs = min(32, fit, SHARED // (binary.metadata.shared + 1024))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(said)]
    loops = []
    for at, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            loops.append(sum(int(target[1], 16) <= other <= at for other, _, _ in found))
    loop = max(loops, default=0)
    return Code(registers, programs, len(found) - loop, loop)


if __name__ == "__main__":
    raise SystemExit(main())
