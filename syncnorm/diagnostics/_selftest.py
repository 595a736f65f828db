"""A trial of this installation on two ranks of this machine: are they equal to one process, and are faults named?"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.conversion import convert
from syncnorm.distributed.collectives import group_position
from syncnorm.distributed.groups import GroupSpec, resolve
from syncnorm.distributed.watch import set_watch
from syncnorm.errors import SyncNormMismatch, SyncNormPeerLost
from syncnorm.testing import RankError, run_ranks

__all__ = ["Trial", "selftest"]

_EQUAL = 1e-12  # of float64 sums over 20 values of size 1: rounding is 1e-16 of each
_PATIENCE = 10.0  # seconds; a killed rank is found without waiting for them


@dataclass(frozen=True)
class Trial:
    """One part of the self-test.

    Attributes:
        name: What must hold.
        ok: Whether it did.
        detail: The figure, or the words of the error.
        seconds: How long it took, with starting the ranks.
    """

    name: str
    ok: bool
    detail: str
    seconds: float


def selftest(timeout: float = 60.0) -> tuple[Trial, ...]:
    """Run two ranks on this machine's CPU over gloo's loopback, with a time limit.

    Args:
        timeout: Seconds for each trial.
    """
    return (
        _try("two ranks equal one process", timeout, _equality, _judge_equality),
        _try("a mismatch is named on both ranks", timeout, _mismatch, _judge_mismatch),
        _try("a killed rank is named by the other", timeout, _killed, _judge_killed, lost=[1]),
    )


def _try(
    name: str, timeout: float, fn: Callable[[], Any], judge: Callable[[list[Any]], tuple[bool, str]], **options: Any
) -> Trial:
    start = time.monotonic()
    try:
        ok, detail = judge(run_ranks(fn, 2, timeout=timeout, group_timeout=timeout, **options))
    except RankError as error:
        lines = [f"rank {rank}: {text.strip().splitlines()[-1]}" for rank, text in sorted(error.errors.items())]
        ok, detail = False, "; ".join(lines)
    return Trial(name, ok, detail, round(time.monotonic() - start, 1))


def _rank() -> int:
    return group_position(resolve(GroupSpec()).name)


def _step(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    return y.detach(), dx


def _equality() -> float:
    """Largest error of output, input gradient and running statistics on uneven shards."""
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = (slice(0, 3), slice(3, 5))[_rank()]
    whole, layer = nn.BatchNorm1d(4).double(), convert(nn.BatchNorm1d(4).double())
    expected, found = _step(whole, x), _step(layer, x[mine])
    pairs = [(a[mine], b) for a, b in zip(expected, found, strict=True)]
    pairs += zip(whole.buffers(), layer.buffers(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def _judge_equality(errors: list[float]) -> tuple[bool, str]:
    return max(errors) < _EQUAL, f"largest error {max(errors):.1e}, at most {_EQUAL:g}"


def _mismatch() -> str:
    """What a rank hears when the other one runs two layers of the same size in another order."""
    model = convert(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    order = (0, 1) if _rank() == 0 else (1, 0)
    try:
        for index in order:
            model.get_submodule(str(index))(torch.randn(3, 4))
    except SyncNormMismatch as error:
        return str(error)
    return ""


def _judge_mismatch(texts: list[str]) -> tuple[bool, str]:
    return all(texts), next((text for text in texts if text), "not noticed: statistics of two layers were mixed")


def _killed() -> tuple[str, str, float]:
    """What the survivor hears, and after how many seconds."""
    set_watch(_PATIENCE)
    layer, x = convert(nn.BatchNorm1d(4)), torch.randn(3, 4)
    layer(x)
    if _rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        layer(x)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def _judge_killed(answers: list[Any]) -> tuple[bool, str]:
    kind, text, seconds = answers[0]
    if kind == SyncNormPeerLost.__name__:
        return True, f"after {seconds:.1f} s: {text}"
    return False, f"noticed after {seconds:.1f} s, and not named: {kind}: {text}" if kind else "not noticed"
