"""Handwritten digits on two processes with nothing but PyTorch, and batch norm over both by one line.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_ddp.py [--small]

At 2 digits per process, local batch norm cannot learn this (scripts/demo.sh shows the difference).

(*) A group that is kept lives until Python ends, and torch 2.13 may end in "terminate called without an active exception"
then: a thread of gloo frees a tensor when Python is half gone. It needs no syncnorm for that; one run in a hundred does it.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions keep the default one, and DDP imports it later (*)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import syncnorm

BATCH = 2  # digits per process and step
LR_AT_32 = 0.03  # at a global batch of 32; scaled in proportion to the batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer epochs")
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(num_epochs=2 if args.small else 8, device=device)
    finally:
        dist.destroy_process_group()


def train(num_epochs: int, device: torch.device) -> None:
    train_set, (test_x, test_y) = digits(num_train=999)  # odd: the last batch is smaller on one process of two
    rank, world = dist.get_rank(), dist.get_world_size()
    sampler = DistributedSampler(train_set, seed=0)
    loader = DataLoader(train_set, BATCH, sampler=sampler)
    # The sampler repeats digits until every process has as many. Without those, this process has:
    num_mine = len(range(rank, len(train_set), world))

    torch.manual_seed(0)
    model = DistributedDataParallel(syncnorm.convert(mlp()).to(device))  # the one line
    model.broadcast_buffers = False  # every rank computes the same statistics, nobody has to send them
    optimizer = torch.optim.SGD(model.parameters(), lr=LR_AT_32 * BATCH * world / 32, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * len(loader))
    for epoch in range(num_epochs):
        model.train()
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader):
            num_left = max(num_mine - step * BATCH, 0)  # 0 is fine: a process without a digit takes part with none
            images, labels = images[:num_left].to(device), labels[:num_left].to(device)
            # DDP averages over processes; the weight makes that the average over digits. (A sum, and then divided: the
            # mean over no digit would be NaN.)
            loss = cross_entropy(model(images), labels, reduction="sum") / max(len(labels), 1)
            loss = loss * syncnorm.loss_weight(len(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            error = (model.module(test_x.to(device)).argmax(1) != test_y.to(device)).double().mean().item()
        say(f"epoch {epoch + 1}/{num_epochs}: test error {100 * error:.2f} %")
    say(syncnorm.audit(model))


def digits(num_train: int) -> tuple[Dataset, tuple[Tensor, Tensor]]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return TensorDataset(images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:])


def mlp() -> nn.Module:
    hidden = [(nn.Linear(n, 128), nn.BatchNorm1d(128), nn.ReLU()) for n in (64, 128, 128)]
    return nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(128, 10))


def say(text: object) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
