"""The part of a benchmark that runs on every rank: a layer over each way that rows can travel, against one of torch's alone."""

import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.diagnostics._timing import Times, step, tensor

__all__ = ["WAYS", "interleave_ranks", "layer_times", "layers", "ways"]

WAYS: tuple[Literal["collective", "shm"], ...] = ("collective", "shm")
_BLOCK = 5
_TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def ways() -> list[str]:
    """Those of :data:`WAYS` that the ranks agree on."""
    found: list[str] = []
    for way in WAYS:
        syncnorm.set_exchange(way)
        try:
            syncnorm.SyncBatchNorm1d(2)(torch.randn(3, 2))
        except syncnorm.SyncNormError:  # on all ranks alike
            continue
        found.append(way)
    return found


def layers(x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of torch's layer on this rank alone, ``"local"``, and of ours by each way."""
    channels = x.size(1)
    ours = {way: step(syncnorm.SyncBatchNorm(channels), x, grad) for way in ways()}
    return {"local": step(_TORCHS[x.dim()](channels), x, grad), **ours}


def layer_times(shape: tuple[int, ...], dtype: torch.dtype, rounds: int, threads: int) -> Times:
    """Seconds by case, on one rank."""
    torch.set_num_threads(threads)
    torch.manual_seed(dist.get_rank())
    return interleave_ranks(layers(tensor(shape, dtype), tensor(shape, dtype)), rounds)


def interleave_ranks(cases: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Wall clock, in blocks: ranks agree anew on the way after each change of it, and start a block together."""
    times: Times = {name: [] for name in cases}
    for _ in range(-(-rounds // _BLOCK)):
        for name, run in cases.items():
            way, _, check = name.partition(" ")
            syncnorm.set_check(check if check in ("off", "inline") else "inline")
            syncnorm.set_exchange("shm" if way == "shm" else "collective")
            run()
            run()
            dist.barrier()
            for _ in range(_BLOCK):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return times
