"""Trains the variants of the demo's network on this rank; torchrun starts it once a rank, ``demo`` calls torchrun.

An MLP and not a CNN on purpose: the count behind a statistic is batch × height × width, so at 2 samples an 8×8 CNN shows
no fault.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # early, or it keeps the group beyond its end: see examples/torchrun_ddp.py
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.cli._console import progress
from syncnorm.testing._digits import NUM_TRAIN_DIGITS, digits

VARIANTS = ("local BN", "syncnorm", "GroupNorm")
LR_AT_32 = 0.03
"""At a global batch of 32, scaled in proportion to the batch; the same for every variant."""


def main() -> None:
    """Read what to do from the command line, and let rank 0 write what was found as JSON."""
    epochs, batch_per_rank, seeds, path = *map(int, sys.argv[1:4]), Path(sys.argv[4])
    local_rank, num_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= num_local
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=60))
    try:
        total = seeds * epochs * (NUM_TRAIN_DIGITS // (batch_per_rank * dist.get_world_size()))
        runs = {}
        for variant in VARIANTS:
            shown = progress(f"{variant:>9}", total) if dist.get_rank() == 0 else nullcontext(lambda text: None)
            with shown as advance:
                runs[variant] = [train(variant, seed, epochs, batch_per_rank, device, advance) for seed in range(seeds)]
        if dist.get_rank() == 0:
            path.write_text(json.dumps(runs))
    finally:
        dist.destroy_process_group()


def build(variant: str) -> nn.Module:
    """The network, 64-128-128-128-10."""
    layers: list[nn.Module] = []
    for num_in in (64, 128, 128):
        layers += [nn.Linear(num_in, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    if variant == "syncnorm":
        return syncnorm.convert(model)
    if variant == "GroupNorm":
        return syncnorm.convert(model, to="group_norm", num_groups=8)
    return model


def train(
    variant: str, seed: int, epochs: int, batch_per_rank: int, device: torch.device, advance: Callable[[str], None]
) -> dict[str, Any]:
    """One run as plain data: the error after each epoch, drift, time and collectives of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    train_x, train_y, test_x, test_y = (tensor.to(device) for tensor in digits())
    torch.manual_seed(seed)
    model = DistributedDataParallel(build(variant).to(device))
    # Buffers stay with their rank, for every variant. By default DDP copies rank 0's over the others' before each
    # forward, which hides the drift and leaves its cause. (torch 2.13 renamed the argument, not this attribute.)
    model.broadcast_buffers = False
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR_AT_32 * batch_per_rank * world / 32, momentum=0.9, weight_decay=1e-4
    )
    num_steps = NUM_TRAIN_DIGITS // (batch_per_rank * world)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * num_steps)

    def step(mine: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(train_x[mine]), train_y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    shuffle = torch.Generator().manual_seed(seed)  # the same order on every rank
    errors, drifts, ms, said = [], [], [], f"seed {seed}"
    for _ in range(epochs):
        model.train()
        order = torch.randperm(NUM_TRAIN_DIGITS, generator=shuffle)[: num_steps * batch_per_rank * world]
        shards = order.view(num_steps, world, batch_per_rank)[:, rank].to(device)
        synchronize(device)
        began = time.perf_counter()
        for mine in shards:
            step(mine)
            schedule.step()
            advance(said)
        synchronize(device)
        ms.append((time.perf_counter() - began) * 1e3 / num_steps)
        errors.append(error_percent(model.module, test_x, test_y))
        drifts.append(drift(model.module))
        said = f"seed {seed}, test error {errors[-1]:.1f} %"
    result = {"seed": seed, "errors": errors, "drifts": drifts, "ms_per_step": median(ms)}
    if rank == 0 and not sys.stderr.isatty():
        print(f"{variant:>9}  {said}, {median(ms):.1f} ms/step", file=sys.stderr, flush=True)
    if seed == 0:
        model.train()
        counted = list(shards[:4])
        with_ddp = count_collectives(step, counted)
        with model.no_sync():  # DDP leaves its gradient buckets alone; what remains is the norm layers' own
            own = count_collectives(step, counted)
        result |= {"norm_collectives": own, "ddp_collectives": with_ddp - own}
    return result


@torch.no_grad()
def error_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Error of each rank's own copy, with its own running statistics, on the whole test set; mean over the ranks."""
    model.eval()
    wrong = (model(images).argmax(1) != labels).float().mean()
    dist.all_reduce(wrong)
    return 100 * float(wrong) / dist.get_world_size()


@torch.no_grad()
def drift(model: nn.Module) -> float | None:
    """Largest gap between two ranks' running means, in running standard deviations of the channel; None without any."""
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    if not norms:
        return None
    mean, var = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var"))
    low, high = mean.clone(), mean.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    dist.all_reduce(var)
    return float(((high - low) / (var / dist.get_world_size()).sqrt()).max())


def count_collectives(step: Callable[[Tensor], None], shards: list[Tensor]) -> float:
    """How many collectives this rank enters in a step, those that DDP issues from C++ among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for mine in shards:
            step(mine)
    names = [event.name for event in profile.events()]
    entered: int = sum(name.startswith("c10d::") or name == "syncnorm::shm_sum" for name in names)
    return entered / len(shards)


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
