"""That simulated ranks are real ones: the same training in one process and on gloo ranks under DDP, in float64."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from study_parts import data, models
from study_parts.layers import Norms
from syncnorm.testing import run_ranks

Row = dict[str, Any]

RANKS, PER_RANK, STEPS, LR = 4, 4, 5, 0.03


def compare(seeds: list[int], *, method: str) -> list[Row]:
    """Largest difference of parameters, and of running statistics, after five steps on four ranks of two samples each."""
    return [{"seed": seed} | _compare(seed, method) for seed in seeds]


def _compare(seed: int, method: str) -> Row:
    real = run_ranks(train, RANKS, seed, method, timeout=120)
    norms = Norms(method, 1, RANKS)
    net = models.initialise(models.mlp(norms), [seed]).double()
    optimizer = _sgd(net)
    images, labels, order = _data(seed)
    for chosen in order:
        _step(net, optimizer, images[chosen], labels[chosen])
    weights = [p.detach() for p in net.parameters()]
    statistics = [s.view(RANKS if method != "SyncBN" else 1, -1) for s in _statistics(net)]
    return {
        "parameters": max(_gap(a, b) for rank in real for a, b in zip(weights, rank[0], strict=True)),
        "statistics": max(
            (_gap(s[i % len(s)], b) for i, rank in enumerate(real) for s, b in zip(statistics, rank[1], strict=True)),
            default=0.0,
        ),
    }


def train(seed: int, method: str) -> tuple[list[Tensor], list[Tensor]]:
    """On every rank: its part of each batch, with the layers that the simulation has for one rank."""
    net = models.initialise(models.mlp(Norms(method, 1)), [seed]).double()
    for module in net.modules():
        if method != "SyncBN" and hasattr(module, "process_group"):
            module.process_group = 1  # each rank for itself, and its buffers too
    wrapped = DistributedDataParallel(net)
    wrapped.broadcast_buffers = False
    optimizer = _sgd(net)
    images, labels, order = _data(seed)
    for chosen in order.view(STEPS, RANKS, PER_RANK)[:, dist.get_rank()]:
        _step(wrapped, optimizer, images[chosen], labels[chosen])
    return [p.detach() for p in net.parameters()], _statistics(net)


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    images, labels, _, _ = data.digits()
    return images.double(), labels, data.orders(data.NUM_TRAIN, [seed], 1, RANKS * PER_RANK)[:STEPS, :, 0]


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _statistics(net: nn.Module) -> list[Tensor]:
    return [b for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.flatten() - b.flatten()).abs().max())
