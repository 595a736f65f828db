"""Tier: gloo ranks. Ranks with 5, 3 and 2 batches finish, and every step is that of the ranks that still had data."""

import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import run_ranks

STEPS = [5, 3, 2]


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(3 + rank, 6, generator=generator, dtype=torch.float64)


def network(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, channels), nn.BatchNorm1d(channels), nn.Tanh(), nn.Linear(channels, 4), nn.BatchNorm1d(4)]
    return nn.Sequential(*layers).double()


def loss(y: Tensor) -> Tensor:
    return y.pow(3).sum()


def _train(channels: int, wrapped: bool, watched: bool) -> list[dict[str, Tensor]]:
    rank, states = dist.get_rank(), []
    if watched:
        syncnorm.set_watch(20.0)
    model = syncnorm.convert(network(channels))
    model = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # two epochs: groups are made, used and left twice
        with syncnorm.join(model):
            for step in range(STEPS[rank]):
                optimizer.zero_grad()
                loss(model(batch(step, rank))).backward()
                optimizer.step()
        states.append({k.removeprefix("module."): v.clone() for k, v in model.state_dict().items()})
    assert all(m.process_group == "world" for m in model.modules() if syncnorm.modules.is_synced(m))
    return states


def one_process(channels: int) -> list[dict[str, Tensor]]:
    """All batches that there are at a step, in one; DDP divides by the ranks that it began with."""
    model, states = network(channels), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        for step in range(max(STEPS)):
            optimizer.zero_grad()
            x = torch.cat([batch(step, rank) for rank in range(3) if step < STEPS[rank]])
            (loss(model(x)) / 3).backward()
            optimizer.step()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return states


@pytest.mark.gloo
@pytest.mark.parametrize(("channels", "watched"), [(8, False), (300, False), (8, True)])
def test_uneven_epochs_under_ddp(channels: int, watched: bool) -> None:
    exact = one_process(channels)
    for states in run_ranks(_train, 3, channels, True, watched, timeout=90):
        for epoch, state in enumerate(states):
            for name, value in exact[epoch].items():
                torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=f"epoch {epoch}: {name}")


def _without_ddp() -> list[float]:
    rank = dist.get_rank()
    dist.new_group([0, 1])  # one rank is in fewer groups
    layer = syncnorm.SyncBatchNorm1d(6, dtype=torch.float64)
    with syncnorm.join(layer):
        for step in range(STEPS[rank]):
            loss(layer(batch(step, rank))).backward()
    return layer.running_mean.tolist()


@pytest.mark.gloo
def test_a_bare_layer() -> None:
    exact = nn.BatchNorm1d(6, dtype=torch.float64)
    for step in range(5):
        exact(torch.cat([batch(step, rank) for rank in range(3) if step < STEPS[rank]]))
    for mean in run_ranks(_without_ddp, 3, timeout=60):
        torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), exact.running_mean, rtol=1e-12, atol=1e-12)


def _many_epochs() -> list[tuple[int, int]]:
    rank, seen = dist.get_rank(), []
    syncnorm.set_watch(20.0)
    layer = syncnorm.SyncBatchNorm1d(6, dtype=torch.float64)
    for epoch in range(4):
        with syncnorm.join(layer):
            for step in range(0 if epoch == 0 and rank else 1 + rank):  # at first one rank has nothing at all
                loss(layer(batch(step, rank))).backward()
        seen.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    return seen


@pytest.mark.gloo
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are counted in /proc")
def test_epochs_leave_neither_files_nor_threads() -> None:
    for seen in run_ranks(_many_epochs, 2, timeout=60):
        assert len(set(seen)) == 1, seen


def _no_join() -> str:
    syncnorm.set_watch(2.0)
    rank = dist.get_rank()
    layer = syncnorm.SyncBatchNorm1d(6, dtype=torch.float64)
    try:
        for step in range(STEPS[rank]):
            loss(layer(batch(step, rank))).backward()
        torch.distributed.barrier()
    except (syncnorm.SyncNormError, RuntimeError) as error:
        return type(error).__name__
    return "completed"


@pytest.mark.gloo
def test_without_it_there_is_a_named_error() -> None:
    assert run_ranks(_no_join, 2, timeout=60, group_timeout=8)[0] == "SyncNormTimeout"


def _one_with_data_ends() -> str:
    syncnorm.set_watch(20.0)
    rank = dist.get_rank()
    layer = syncnorm.SyncBatchNorm1d(6, dtype=torch.float64)
    try:
        with syncnorm.join(layer):
            for step in range(STEPS[rank]):
                loss(layer(batch(step, rank))).backward()
                if step == 3:
                    os._exit(3)
    except RuntimeError as error:  # that of torch, which meets the ranks in its own way, names nobody
        return f"{type(error).__name__}: {error}"
    return "completed"


@pytest.mark.gloo
def test_who_stands_in_for_itself_names_one_with_data_that_ends() -> None:
    for text in run_ranks(_one_with_data_ends, 3, timeout=60, group_timeout=20, lost=[0])[1:]:
        assert text.startswith("SyncNormPeerLost: ranks [0] are gone: their processes have ended"), text
        assert "no layer: it has run out of data and stands in" in text


def test_a_lone_process_has_nobody_to_wait_for() -> None:
    layer, exact = syncnorm.SyncBatchNorm1d(6, dtype=torch.float64), nn.BatchNorm1d(6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    with syncnorm.join(layer):
        assert torch.equal(layer(x), exact(x))


def test_off_is_refused() -> None:
    syncnorm.set_check("off")
    try:
        with pytest.raises(syncnorm.SyncNormError, match="needs to know the length of rows"), syncnorm.join(nn.ReLU()):
            pass
    finally:
        syncnorm.set_check("inline")
