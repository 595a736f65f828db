"""Trains one variant of the demo's network on this rank; torchrun starts it once a rank, `demo.py` calls torchrun.

    python -m torch.distributed.run --standalone --nproc-per-node 2 scripts/demo_train.py --variant syncnorm

An MLP and not a CNN on purpose: the count behind a statistic is batch * height * width, so at 2 samples an 8x8 CNN
shows no fault.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # early, or it keeps the group beyond its end: see examples/torchrun_ddp.py
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import syncnorm

VARIANTS = ("local BN", "syncnorm", "GroupNorm")
LR_AT_32 = 0.03  # at a global batch of 32, scaled in proportion to the batch; the same for every variant
EPOCHS = 8
NUM_TRAIN = 1000  # of 1797; the other 797 are the test set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-per-rank", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--result", type=Path, help="rank 0 writes what it found here, as JSON")
    args = parser.parse_args()

    local_rank, num_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= num_local
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=60))
    try:
        total = args.seeds * args.epochs * (NUM_TRAIN // (args.batch_per_rank * dist.get_world_size()))
        shown = dist.get_rank() == 0 and sys.stderr.isatty()
        with tqdm(total=total, desc=f"{args.variant:>9}", unit="step", disable=not shown) as bar:
            runs = [
                train(args.variant, seed, args.epochs, args.batch_per_rank, device, bar) for seed in range(args.seeds)
            ]
        if dist.get_rank() == 0 and args.result:
            args.result.write_text(json.dumps(runs))
    finally:
        dist.destroy_process_group()


def build(variant: str) -> nn.Module:
    layers: list[nn.Module] = []
    for num_in in (64, 128, 128):
        layers += [nn.Linear(num_in, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    if variant == "syncnorm":
        return syncnorm.convert(model)
    if variant == "GroupNorm":
        return syncnorm.convert(model, to="group_norm", num_groups=8)
    return model


def train(variant: str, seed: int, epochs: int, batch_per_rank: int, device: torch.device, bar: tqdm) -> dict[str, Any]:
    """Returns one run as plain data: the error after each epoch, drift, time and collectives of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    train_x, train_y, test_x, test_y = digits(device)
    torch.manual_seed(seed)
    model = DistributedDataParallel(build(variant).to(device))
    # Buffers stay with their rank, for every variant. By default DDP copies rank 0's over the others' before each
    # forward, which hides the drift and leaves its cause. (torch 2.13 renamed the argument, not this attribute.)
    model.broadcast_buffers = False
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR_AT_32 * batch_per_rank * world / 32, momentum=0.9, weight_decay=1e-4
    )
    num_steps = NUM_TRAIN // (batch_per_rank * world)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * num_steps)

    def step(mine: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(train_x[mine]), train_y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    shuffle = torch.Generator().manual_seed(seed)  # the same order on every rank
    errors, drifts, ms = [], [], []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(NUM_TRAIN, generator=shuffle)[: num_steps * batch_per_rank * world]
        shards = order.view(num_steps, world, batch_per_rank)[:, rank].to(device)
        synchronize(device)
        began = time.perf_counter()
        for mine in shards:
            step(mine)
            schedule.step()
            bar.update()
        synchronize(device)
        ms.append((time.perf_counter() - began) * 1e3 / num_steps)
        errors.append(error_percent(model.module, test_x, test_y))
        drifts.append(drift(model.module))
        bar.set_postfix_str(f"seed {seed}, test error {errors[-1]:.1f} %")
    result = {"seed": seed, "errors": errors, "drifts": drifts, "ms_per_step": median(ms)}
    if rank == 0 and not sys.stderr.isatty():
        print(f"{variant:>9}  seed {seed}: test error {errors[-1]:.2f} %, {median(ms):.1f} ms/step", flush=True)
    if seed == 0:
        model.train()
        counted = list(shards[:4])
        with_ddp = count_collectives(lambda: [step(mine) for mine in counted]) / len(counted)
        with model.no_sync():  # DDP leaves its gradient buckets alone; what remains is the norm layers' own
            own = count_collectives(lambda: [step(mine) for mine in counted]) / len(counted)
        result |= {"norm_collectives": own, "ddp_collectives": with_ddp - own}
    return result


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [1000, 64] and labels [1000], test images [797, 64] and labels [797]: one split for all ranks."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.data, dtype=torch.float32) / 16)[order].to(device)
    labels = torch.tensor(data.target)[order].to(device)
    return images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:]


@torch.no_grad()
def error_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Error of each rank's own copy, with its own running statistics, on the whole test set; mean over the ranks."""
    model.eval()
    wrong = (model(images).argmax(1) != labels).float().mean()
    dist.all_reduce(wrong)
    return 100 * wrong.item() / dist.get_world_size()


@torch.no_grad()
def drift(model: nn.Module) -> float | None:
    """Largest gap between two ranks' running means, in running standard deviations of the channel; None without any."""
    means = [m.running_mean for m in model.modules() if getattr(m, "running_mean", None) is not None]
    variances = [m.running_var for m in model.modules() if getattr(m, "running_var", None) is not None]
    if not means:
        return None
    mean = torch.cat(means)
    low, high, var = mean.clone(), mean.clone(), torch.cat(variances)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    dist.all_reduce(var)
    return ((high - low) / (var / dist.get_world_size()).sqrt()).max().item()


def count_collectives(work: Callable[[], object]) -> int:
    """How many collectives this rank enters during ``work``, those that DDP issues from C++ among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    names = [event.name for event in profile.events()]
    return sum(name.startswith("c10d::") or name == "syncnorm::shm_sum" for name in names)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
