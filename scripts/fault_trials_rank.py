"""What one rank of a fault trial does: a few training steps with a fault in them, and an account of how they ended.

Also a textbook synchronised batch norm to compare with: the collectives and the arithmetic of torch's class, which itself
refuses to run on CPU.
"""

import json
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

import syncnorm
from syncnorm.distributed.wire import set_exchange
from syncnorm.errors import SyncNormError
from syncnorm.testing import FaultInjected, inject

STEPS = 3
SAMPLES = 4
LAYERS = ("norm1", "norm2", "norm3", "norm4")
WIDTHS = (8, 8, 5, 8)
LINGER = 8.0  # seconds, longer than the group's time limit in the trials
ENDING = ("kill", "exit", "stop", "stuck", "raise")
"""Faults after which the victim has no account to give."""


@dataclass(frozen=True)
class Spec:
    """One trial."""

    fault: str
    layer: str
    step: int
    victim: int
    world: int
    seed: int
    patience: float


class Textbook(nn.BatchNorm1d):
    """Synchronised batch norm as torch has it: gather mean, inverse deviation and count; in backward sum two vectors."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if x.size(1) != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {x.size(1)}")
        return _Textbook.apply(x, self.weight, self.bias, self)


class _Textbook(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.BatchNorm1d) -> Tensor:
        var, mean = torch.var_mean(x.float(), 0, correction=0)
        row = torch.cat([mean, (var + layer.eps).rsqrt(), mean.new_full((1,), len(x))]).detach()
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row)
        means, invstds, counts = torch.stack(rows).split([len(mean), len(mean), 1], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (invstds.square().reciprocal() - layer.eps + (means - mean).square())).sum(0) / count
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * count / (count - 1), layer.momentum)
        rstd = (var + layer.eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd, count)
        return ((x - mean) * rstd * weight + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        x_hat = (x - mean) * rstd
        dbias, dweight = grad.sum(0), (grad * x_hat).sum(0)
        sums = torch.cat([dbias, dweight])
        dist.all_reduce(sums)
        total_bias, total_weight = (sums / count).chunk(2)
        dx = weight * rstd * (grad - total_bias - x_hat * total_weight)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    width = 6
    for name, wider in zip(LAYERS, WIDTHS, strict=True):
        net.add_module(f"linear{name[-1]}", nn.Linear(width, wider))
        net.add_module(name, nn.BatchNorm1d(wider))
        net.add_module(f"tanh{name[-1]}", nn.Tanh())
        width = wider
    return net


def train(net: nn.Module, data: Tensor) -> list[Tensor]:
    """Steps of two micro-batches with a loss each; outputs, input gradients, and the buffers at the end."""
    found = []
    for step in range(STEPS):
        xs = [x.clone().requires_grad_() for x in data[2 * step : 2 * step + 2]]
        ys = [net(x) for x in xs]
        for y in ys:
            y.pow(2).sum().backward()
        found += [*(y.detach() for y in ys), *(x.grad for x in xs)]
    return found + [b.detach().double() for b in net.buffers()]


def batches(spec: Spec) -> Tensor:
    """Of all ranks, for all steps ``[2·steps, ranks·samples, features]``."""
    return torch.randn(2 * STEPS, spec.world * SAMPLES, 6, generator=torch.Generator().manual_seed(spec.seed))


def run(spec: Spec, contender: str, folder: Path) -> None:
    """One rank of one trial; what became of it is written to ``folder``."""
    warnings.simplefilter("ignore")  # ranks and cores, once a trial
    rank = dist.get_rank()
    net, data = network(), batches(spec)
    whole = train(network(), data)
    if contender == "textbook":
        for name in LAYERS:
            net.get_submodule(name).__class__ = Textbook
    else:
        syncnorm.convert(net)
        syncnorm.set_check("off" if contender == "off" else "inline")
        set_exchange("collective" if contender != "shm" else "shm")
        syncnorm.set_watch(spec.patience if contender == "watch" else None)
    part = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    outcome: dict[str, Any] = {"kind": "completed", "text": "", "named": False}

    def struck() -> None:
        (folder / "struck").write_text(repr(time.monotonic()))

    try:
        of_backward = spec.fault.endswith("backward") or spec.fault == "backward_order"
        options: dict[str, Any] = {} if of_backward else {"layer": spec.layer}
        seconds = 0.3 if spec.fault == "slow" else 3600.0
        fault: Any = "stuck" if spec.fault == "slow" else spec.fault
        with (
            inject(net, fault, call=2 * spec.step + 1, rank=spec.victim, seconds=seconds, on_strike=struck, **options)
            if spec.fault != "none"
            else nullcontext()
        ):
            found = train(net, data[:, part])
        exact = [w[part] if len(w.shape) == 2 else w for w in whole]
        if spec.fault != "empty":  # or there is nothing to compare with
            outcome["error"] = max(
                float((a.double() - b.double()).abs().max()) for a, b in zip(found, exact, strict=True)
            )
    except FaultInjected:
        os._exit(1)  # as a program does that raises
    except AssertionError as error:
        outcome |= {"kind": "the fault did not happen", "text": str(error)}
    except Exception as error:
        outcome |= {"kind": type(error).__name__, "text": str(error)[:1000], "named": is_named(error, spec, rank)}
    outcome["at"] = time.monotonic()
    partial = folder / f"{rank}.partial"
    partial.write_text(json.dumps(outcome))
    partial.rename(folder / f"{rank}.json")
    # A rank that ended now would close its connections, and those that wait would hear of it sooner than they would of the
    # fault.
    live = [r for r in range(spec.world) if r != spec.victim or spec.fault not in ENDING]
    deadline = time.monotonic() + LINGER
    while time.monotonic() < deadline and not all((folder / f"{r}.json").exists() for r in live):
        time.sleep(0.01)


def is_named(error: Exception, spec: Spec, rank: int) -> bool:
    """Whether an error is ours and says which rank it was and where; a rank that refuses its own input says why."""
    text = str(error)
    if isinstance(error, ValueError):
        return rank == spec.victim and spec.fault == "bad_input" and "channels in dim 1" in text
    names_rank = str(spec.victim) in text.replace("[", " ").replace("]", " ").replace(",", " ").split()
    return isinstance(error, SyncNormError) and names_rank and any(f"'{name}'" in text for name in LAYERS)
