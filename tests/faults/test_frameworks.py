"""Tier: no process, and gloo ranks. Skipped optimizer steps, uneven validation, a counter of -1, ports, hostile modules."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import count_collectives, run_ranks
from tests.faults.network import network

PACKAGE = Path(syncnorm.__file__).parent


def _skipped_steps() -> tuple[list[float], list[Tensor], int]:
    """fp16 with a loss scale that overflows on one rank in the second of four steps."""
    rank = dist.get_rank()
    net = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(4):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            y = net(x)
            loss = y.float().pow(2).sum() * (torch.inf if step == 1 and rank == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, [b.clone() for b in net.buffers()], int(net.module.norm1.num_batches_tracked)


@pytest.mark.gloo
def test_a_step_that_the_scaler_skips_skips_no_exchange() -> None:
    (scales, first, counted), (_, second, _) = run_ranks(_skipped_steps, 2, timeout=60)
    assert scales == [1024.0, 512.0, 512.0, 512.0]  # one step was skipped, on both ranks
    assert counted == 4
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


def _uneven_validation() -> tuple[list[Tensor], list[Tensor]]:
    """As a validation loop does whose dataset the ranks cannot share evenly."""
    rank, net = dist.get_rank(), network()
    for epoch in range(2):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * epoch + rank))
        net.train()(x).sum().backward()
        net.eval()
        with torch.no_grad(), count_collectives() as counts:
            for _ in range(3 * rank):
                net(x)
        assert not counts
    return [b.clone() for b in net.buffers()], [p.grad.clone() for p in net.parameters()]


@pytest.mark.gloo
def test_ranks_may_evaluate_different_numbers_of_batches() -> None:
    first, second = run_ranks(_uneven_validation, 2, timeout=60)
    assert all(a.equal(b) for a, b in zip(first[0], second[0], strict=True))
    assert all(g.isfinite().all() for grads in (first[1], second[1]) for g in grads)


def test_a_counter_of_minus_one_is_refused_by_those_who_look_and_crashes_nobody() -> None:
    layer = syncnorm.SyncBatchNorm1d(3, momentum=None)
    state = layer.state_dict() | {"num_batches_tracked": torch.tensor(-1)}
    with pytest.raises(ValueError, match="num_batches_tracked is negative"):
        syncnorm.validate_state_dict(layer, state)
    layer.load_state_dict(state)
    layer(torch.randn(4, 3))
    assert layer.running_mean.isfinite().all()


def test_nothing_opens_a_port() -> None:
    # Ranks find each other through the group that the user made. run_ranks makes one, over a file and loopback, and the demo is
    # a program of its own, to whose ranks its launcher says where they meet.
    opening = {"socket", "bind", "listen", "create_server", "TCPStore", "HTTPServer"}
    for path in PACKAGE.rglob("*.py"):
        called = {
            ast.unparse(n.func).rpartition(".")[2]
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call)
        }
        assert not called & opening, (path, called & opening)
        assert "init_process_group" not in called or path.name in ("ranks.py", "_demo_rank.py"), path
        assert "tcp://" not in path.read_text(), path


class Hostile(nn.Module):
    """Does something whenever somebody looks."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("conversion called a forward")

    def __repr__(self) -> str:
        return "\x1b[2J" + "A" * 1_000_000

    def __getattr__(self, name: str) -> Any:
        if name in ("convert", "forward_pre", "eval_config", "__class_getitem__"):
            raise AssertionError(f"conversion asked for {name}")
        return super().__getattr__(name)


class Named(nn.BatchNorm1d):
    """A subclass that calls itself what torch's class is called."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("conversion called a forward")


Named.__name__ = Named.__qualname__ = "BatchNorm1d"
Named.__module__ = "torch.nn.modules.batchnorm"


def test_hostile_shared_and_cyclic_modules() -> None:
    norm, hostile = nn.BatchNorm1d(3), Hostile()
    hostile.inner = nn.Sequential(norm, Named(3))
    hostile.again = norm
    hostile.inner.add_module("up", hostile)  # a cycle
    for number in range(200):  # deep
        hostile.inner.add_module(f"n{number}", nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="inner.1"):  # left, and said so: a name is no proof of a class
        converted = syncnorm.convert(hostile)
    assert converted is hostile and type(hostile.inner[1]) is Named
    assert type(norm) is syncnorm.SyncBatchNorm1d and hostile.again is norm is hostile.inner[0]
    assert sum(syncnorm.modules.is_synced(m) for m in hostile.modules()) == 201
    assert "\x1b" not in str(syncnorm.plan(hostile))
    syncnorm.revert(hostile)
    assert type(norm) is nn.BatchNorm1d
