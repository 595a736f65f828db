"""The numbers of ``_plan`` one at a time, against what they are: which tiles, programs and stages a device prefers.

Not among the parts that run unless asked for: ``--parts tune``. A knob that wins everywhere becomes the number in ``_plan``.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_parts import primitives

from syncnorm.kernels.triton import _plan

SHAPES = [(64, 256, 56, 56), (32, 2048, 7, 7)]
ROWS = [(32768, 1024), (8192, 4096), (8192, 8192), (4096, 16384)]
BATCH_CASES = ("moments", "normalize", "normalize add relu", "backward reduce", "backward input")
BATCH_KNOBS: dict[str, list[Any]] = {
    "TILE_BYTES": [4096, 16384],
    "PROGRAMS_PER_MULTIPROCESSOR": [4, 16, 32],
    "REDUCE_STAGES": [1, 2, 4],
    "STEPS": [1, 4, 16],
    "NARROW_TILE": [512, 2048],
    "CHANNELS_LAST_BYTES": [128, 512],
}
ROW_KNOBS: dict[str, list[Any]] = {
    "ROW_TILE": [1024, 4096],
    "BACKWARD_TILE": [512, 2048],
    "ROW_REGISTERS": [96, 255],
    "SHARED_BYTES": [0, 48 << 10, 180 << 10],
    "FORWARD_ROW": [8192],
    "BACKWARD_ROW": [
        4096,
        16384,
    ],  # the second spills 100 to 250 bytes a thread, and reads a row of 16384 once and not twice
}


def run(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Rows: knob, value, primitive, shape, layout, dtype, µs, and how many times as fast as with the number in _plan."""
    found = []
    for row in _all(device, dry):
        found.append(row)
        yield row
    ratios: dict[tuple[Any, ...], list[float]] = {}
    for row in found:
        ratios.setdefault((row["knob"], row["value"], row["primitive"]), []).append(row["times as fast"])
    for (knob, value, primitive), values in ratios.items():
        yield found[0] | {
            "knob": knob, "value": value, "primitive": primitive, "shape": "all, geometric mean", "layout": "", "dtype": "",
            "µs": "", "times as fast": round(statistics.geometric_mean(values), 3),
        }  # fmt: skip


def _all(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    dtypes = [torch.float32] if dry else [torch.bfloat16, torch.float32]
    for shape in primitives.DRY if dry else SHAPES:
        for channels_last in (False, True):
            for dtype in dtypes:
                measure = partial(primitives.batch, shape, channels_last, dtype, device, BATCH_CASES)
                yield from _swept(BATCH_KNOBS, measure, dry)
    for m, d in [(4, 16)] if dry else ROWS:
        yield from _swept(ROW_KNOBS, partial(primitives.rows, m, d, dtypes[0], device), dry)


def _swept(
    knobs: dict[str, list[Any]], measure: Callable[[], Iterator[dict[str, Any]]], dry: bool
) -> Iterator[dict[str, Any]]:
    usual = {row["primitive"]: row["µs"] for row in measure()}
    for knob, values in knobs.items():
        before = getattr(_plan, knob)
        for value in values[:1] if dry else values:
            setattr(_plan, knob, value)
            try:
                for row in measure():
                    labels = {key: row[key] for key in ("primitive", "shape", "layout", "dtype", "µs")}
                    yield {
                        "knob": knob, "value": value, **labels, "times as fast": round(usual[row["primitive"]] / row["µs"], 3)
                    }  # fmt: skip
            finally:
                setattr(_plan, knob, before)
