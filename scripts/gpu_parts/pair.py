"""Two ranks that share one device over gloo, each with half of a batch: our layer and ``nn.SyncBatchNorm``, wall time a step.

NCCL refuses two ranks of one device. Gloo carries rows through host memory, so what is compared is what a step asks of the
host and of the device beside that, in the same world. With the exchange through memory that the ranks lend each other, too.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from gpu_parts.timing import random
from torch import Tensor, nn

import syncnorm
from syncnorm.distributed import set_exchange
from syncnorm.errors import SyncNormError
from syncnorm.testing import run_ranks

SHAPES = [(32, 256, 56, 56), (16, 2048, 7, 7), (2, 64, 112, 112)]
STEPS = 10  # in a round
ROUNDS = 12


def run(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Rows: layer, shape of a rank, layout, dtype, provider, µs of forward and backward, and how many times ours that is."""
    for exchange in ("auto", "symmetric"):
        yield from run_ranks(_rank, 2, device, dry, exchange, timeout=60)[0]


def _rank(device: str, dry: bool, exchange: str) -> list[dict[str, Any]]:
    if device == "cuda":
        torch.cuda.set_device(0)
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # torch's own switch for tests
    rows = []
    for shape in [(2, 8, 4, 4)] if dry else SHAPES:
        for dtype in [torch.float32] if dry else [torch.bfloat16, torch.float32]:
            x, g = (random(shape, dtype, device, True) for _ in range(2))
            blocks = {
                "ours": syncnorm.SyncBatchNorm2d(shape[1]).to(device),
                "nn.SyncBatchNorm": nn.SyncBatchNorm(shape[1]).to(device),
            }
            if exchange == "symmetric" or device == "cpu":
                del blocks["nn.SyncBatchNorm"]  # knows no other exchange, and no CPU
            if exchange == "symmetric":
                try:
                    set_exchange("symmetric")
                    _step(blocks["ours"], x, g)()
                except SyncNormError as error:
                    print(f"  no exchange through lent memory: {error}", flush=True)
                    return rows
            times = _medians({name: _step(block, x, g) for name, block in blocks.items()}, device, 2 if dry else ROUNDS)
            for name, seconds in times.items():
                rows.append({
                    "layer": "BatchNorm", "shape": str(shape), "layout": "NHWC", "dtype": str(dtype).removeprefix("torch."),
                    "exchange": "gloo" if exchange == "auto" else exchange, "provider": name, "µs": round(seconds * 1e6, 1),
                    "times ours": round(seconds / times["ours"], 2),
                })  # fmt: skip
    return rows


def _step(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], object]:
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaf), wanted, g)


def _medians(steps: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Seconds a step of the slower rank; the blocks take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            slower = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slower, dist.ReduceOp.MAX)
            times[name].append(float(slower) / STEPS)
    return {name: statistics.median(values[rounds // 4 :]) for name, values in times.items()}
