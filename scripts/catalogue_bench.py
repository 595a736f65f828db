"""Times forward and backward of every norm of the catalogue against torch's own, in one interleaved run.

    python scripts/catalogue_bench.py [--shape 32,64,28,28] [--rounds 15]

One thread, its own CPU time, medians. The statistics family is also given relative to SyncBatchNorm's own walk: none
should cost more than 1.6 of it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from bench import pin_allocator
from bench_cases import interleave, tensor, walk
from torch import Tensor, nn

from syncnorm import modules
from syncnorm.kernels import objections

LIMIT = 1.6
FAMILY = ("BatchRenorm", "GhostBatchNorm", "MovingAverageBatchNorm", "FrozenBatchNorm")


def layers(channels: int, ghost: int, backend: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every layer that takes images, by name."""
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "nn.BatchNorm2d": nn.BatchNorm2d(channels),
        "F.layer_norm (C,H,W)": lambda x: nn.functional.layer_norm(x, x.shape[1:]),
        "SyncBatchNorm2d (walk)": walk(channels, backend),
        "BatchRenorm2d": modules.BatchRenorm2d(channels),
        "GhostBatchNorm2d(N/2)": modules.GhostBatchNorm2d(channels, ghost),
        "MovingAverageBatchNorm2d": modules.MovingAverageBatchNorm2d(channels),
        "FrozenBatchNorm2d": modules.FrozenBatchNorm2d(channels),
    }
    rest = {
        "GroupNorm": lambda: modules.GroupNorm(channels, 32),
        "LayerNorm (channels)": lambda: modules.LayerNorm(channels, channel_dim=1),
        "RMSNorm (channels)": lambda: modules.RMSNorm(channels, channel_dim=1),
        "InstanceNorm2d": lambda: modules.InstanceNorm2d(channels),
        "FilterResponseNorm": lambda: modules.FilterResponseNorm(channels),
        "EvoNormS0": lambda: modules.EvoNormS0(channels),
        "EvoNormB0": lambda: modules.EvoNormB0(channels),
        "DynamicTanh": lambda: modules.DynamicTanh(channels, channel_dim=1),
        "SwitchableNorm2d": lambda: modules.SwitchableNorm2d(channels),
        "BatchInstanceNorm2d": lambda: modules.BatchInstanceNorm2d(channels),
    }
    for name, make in rest.items():
        if hasattr(modules, name.split(" ")[0]):
            made[name] = make()
    return made


def main() -> int:
    """Print the table; 1 if a member of the statistics family is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32,64,28,28")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    pin_allocator()
    torch.set_num_threads(1)
    shape = tuple(int(n) for n in arguments.shape.split(","))
    x, grad = (tensor(shape, torch.float32, torch.contiguous_format) for _ in range(2))
    backend = next(name for name, reason in objections(x).items() if reason is None)
    made = layers(shape[1], max(2, shape[0] // 2), backend)
    cases = {name: _step(layer, x, grad) for name, layer in made.items()}
    times = interleave(cases, arguments.rounds)
    print(
        f"torch {torch.__version__}, {shape} float32, 1 thread, backend {backend}, medians of {arguments.rounds} rounds\n"
    )
    print("| norm | µs | / nn.BatchNorm2d | / F.layer_norm | / SyncBatchNorm2d |\n|---|---|---|---|---|")
    failed = False
    for name in cases:
        ratios = [
            statistics.median(b / a for a, b in zip(times[base], times[name], strict=True))
            for base in ("nn.BatchNorm2d", "F.layer_norm (C,H,W)", "SyncBatchNorm2d (walk)")
        ]
        print(
            f"| {name} | {statistics.median(times[name]) * 1e6:.0f} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |"
        )
        failed |= name.split("2d")[0] in FAMILY and ratios[2] > LIMIT
    if failed:
        print(f"\na member of the statistics family costs more than {LIMIT} of SyncBatchNorm2d", file=sys.stderr)
    return int(failed)


def _step(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        layer(leaf).backward(grad)

    return run


if __name__ == "__main__":
    raise SystemExit(main())
