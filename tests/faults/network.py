"""A small network of four norms, and what a step through it came to on this rank."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm

NORMS = ("norm1", "norm2", "norm3", "norm4")


class Outcome(NamedTuple):
    """How a step ended: the name of its exception, or ``"completed"``; its text; seconds."""

    kind: str
    text: str
    seconds: float


def network(convert: bool = True) -> nn.Sequential:
    """Norms of 8, 8, 5 and 8 channels, the first two of which can be mistaken for each other."""
    torch.manual_seed(0)
    net, width = nn.Sequential(), 6
    for number, wider in enumerate((8, 8, 5, 8), 1):
        net.add_module(f"linear{number}", nn.Linear(width, wider))
        net.add_module(f"norm{number}", nn.BatchNorm1d(wider))
        net.add_module(f"tanh{number}", nn.Tanh())
        width = wider
    return syncnorm.convert(net) if convert else net


def batch(seed: int = 0, samples: int = 4) -> Tensor:
    """This rank's."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randn(samples, 6, generator=generator)


def two_losses(net: nn.Module, seed: int = 0) -> None:
    """A step with two forwards and then two backwards."""
    ys = [net(batch(2 * seed + part)) for part in range(2)]
    for y in ys:
        y.pow(2).sum().backward()


def outcome(step: Callable[[], Any]) -> Outcome:
    start = time.monotonic()
    try:
        step()
        kind, text = "completed", ""
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    return Outcome(kind, text, time.monotonic() - start)
