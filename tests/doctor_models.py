"""What the tests of the command line examine, by name."""

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.norm, x, use_reentrant=False)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def synced() -> tuple[nn.Module, Tensor]:
    return syncnorm.convert(plain()), torch.randn(5, 3)


class Own(nn.BatchNorm1d):
    """Left by convert."""


def left() -> tuple[Tensor, nn.Module]:
    return torch.randn(5, 3), nn.Sequential(nn.Linear(3, 4), Own(4), nn.BatchNorm1d(4))


def broken() -> nn.Module:
    raise RuntimeError("no weights\nin two lines")


def leaving() -> nn.Module:
    sys.exit(3)


class Talking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        print("in its forward")
        return super().forward(x)


def talking() -> tuple[nn.Module, Tensor]:
    print("in its factory")
    return nn.Sequential(Talking(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3)


def array() -> tuple[nn.Module, "np.ndarray[tuple[int, int], np.dtype[np.float64]]"]:
    return plain(), np.zeros((5, 3))


def without() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4))


def fed() -> tuple[nn.Module, list[Tensor]]:
    return plain(), list(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).split(2))


def starved() -> tuple[nn.Module, list[Tensor]]:
    return plain(), []


def mapped() -> tuple[nn.Module, object]:
    return plain(), object()


def number() -> int:
    return 3


shared = plain()
