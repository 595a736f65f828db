"""Tier: gloo ranks. Processes that end, groups that end, threads, versions: beyond test_watch, test_shm and test_groups."""

import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncnorm
from syncnorm.distributed import ledger
from syncnorm.modules import _statistics
from syncnorm.testing import inject, run_ranks
from tests.faults.network import Outcome, batch, network, outcome, two_losses

pytestmark = pytest.mark.gloo


def _killed_in_backward() -> Outcome:
    syncnorm.set_watch(20.0)
    net = network()
    two_losses(net)
    y = net(batch())
    if dist.get_rank() == 0:
        y.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
    return outcome(lambda: y.sum().backward())


def test_a_rank_killed_in_its_backward_is_named() -> None:
    for kind, text, seconds in run_ranks(_killed_in_backward, 3, timeout=60, lost=[0])[1:]:
        assert kind == "SyncNormPeerLost" and "ranks [0] are gone: their processes have ended" in text, (kind, text)
        assert "in 'norm4' call 3 backward C=8 float32" in text
        assert seconds < 10


def _gone_before_the_first_exchange(fault: Any) -> Outcome:
    syncnorm.set_watch(3.0)
    net = network()

    def step() -> None:
        with inject(net, fault, rank=1):
            two_losses(net)

    return outcome(step)


@pytest.mark.parametrize(("fault", "kind", "says"), [
    ("kill", "SyncNormPeerLost", "ranks [1] are gone: their processes have ended"),
    ("stuck", "SyncNormTimeout", "ranks [1] did not come to the first exchange of the process group of ranks [0, 1, 2]"),
])  # fmt: skip
def test_a_rank_that_is_missing_before_ranks_have_ever_met_is_named(fault: str, kind: str, says: str) -> None:
    found = run_ranks(_gone_before_the_first_exchange, 3, fault, timeout=60, lost=[1])
    for rank in (0, 2):
        assert found[rank].kind == kind and says in found[rank].text, found[rank]
        assert "This rank was in 'norm1' call 1 forward C=8 float32, exchange #1." in found[rank].text


def _without_the_one_that_keeps_the_store(port: int) -> Outcome:
    """As where rank 0 is the master and not a launcher beside it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    syncnorm.set_watch(5.0)
    net = network()
    two_losses(net)

    def step() -> None:
        with inject(net, "kill", layer="norm3", rank=0):
            two_losses(net)

    found = outcome(step)
    time.sleep(1.0)  # without the store, a rank that has found out and ended would be one more that is gone
    return found


def test_a_killed_rank_is_named_though_it_kept_the_store() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = run_ranks(_without_the_one_that_keeps_the_store, 4, port, timeout=60, lost=[0])
    for kind, text, seconds in found[1:]:
        assert kind == "SyncNormPeerLost" and "ranks [0] are gone: their processes have ended" in text, (kind, text)
        assert "in 'norm3' call 3 forward C=5 float32" in text and seconds < 10


def _too_late() -> tuple[Outcome, Outcome, float]:
    syncnorm.set_watch(1.5)
    net = network()
    two_losses(net)
    if dist.get_rank() == 1:
        time.sleep(4.0)
    ends = outcome(lambda: two_losses(net)), outcome(lambda: two_losses(net))
    total = torch.ones(1)
    dist.all_reduce(total)  # the world's own group has not suffered
    return *ends, float(total)


def test_a_rank_that_comes_too_late_is_told_so() -> None:
    for first, second, total in run_ranks(_too_late, 2, timeout=60):
        for kind, text, _ in (first, second):
            assert kind == "SyncNormTimeout" and "ranks [1] run code outside of synchronised layers" in text
            assert "The group cannot be used again" in text
        assert total == 2.0


def _leaves(how: str) -> Outcome:
    syncnorm.set_watch(20.0)
    net = network()
    two_losses(net)
    if dist.get_rank() == 1:
        if how == "destroys its groups":
            dist.destroy_process_group()
            time.sleep(60)
        return outcome(lambda: None)  # and ends
    return outcome(lambda: two_losses(net))


@pytest.mark.parametrize(("how", "kind", "says"), [
    ("ends", "SyncNormPeerLost", "ranks [1] are gone: their processes have ended"),
    ("destroys its groups", "SyncNormPeerLost", "ranks [1] live, and have left their process group"),
])  # fmt: skip
def test_a_rank_that_leaves_in_order_is_named(how: str, kind: str, says: str) -> None:
    end = run_ranks(_leaves, 2, how, timeout=60, lost=[1])[0]
    assert end.kind == kind and says in end.text and end.seconds < 15, end


def test_ranks_without_a_group_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(_statistics, "_warned", False)
    net = network()
    with pytest.warns(
        UserWarning, match="norm1 is plain batch norm, of this process alone: WORLD_SIZE=4 says"
    ) as caught:
        net(torch.randn(4, 6))
    assert len(caught) == 1 and "init_process_group" in str(caught[0].message)
    monkeypatch.setattr(_statistics, "_warned", False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network()(torch.randn(4, 6))


def _two_models(shared: bool) -> list[str]:
    """Two threads run a model each, and the ranks begin with different ones."""
    nets = [network(), network()]  # a teacher and a student: layers of the same names and sizes
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    for net, group in zip(nets, groups, strict=True):
        if not shared:
            syncnorm.convert(net, process_group=group)
    ends: list[str] = ["", ""]
    for net in nets:  # both have met once
        net(torch.randn(4, 6))
    dist.barrier()

    def run(which: int) -> None:
        ends[which] = outcome(lambda: nets[which](torch.randn(4, 6))).kind

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads[:: 1 - 2 * dist.get_rank()]:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join(timeout=30)
    return ends


def test_models_of_two_threads_on_one_group_are_told_apart() -> None:
    for ends in run_ranks(_two_models, 2, True, timeout=60):
        assert ends == ["SyncNormMismatch"] * 2
    for ends in run_ranks(_two_models, 2, False, timeout=60):  # one group each is the way to do it
        assert ends == ["completed"] * 2


def _same_names() -> list[Outcome]:
    """A loop that trains one of two models, chosen by what only this rank sees."""
    nets = [network(), network()]
    for net in nets:
        two_losses(net)
    chosen = nets[dist.get_rank()]
    return [outcome(lambda: two_losses(chosen)), outcome(lambda: two_losses(nets[0]))]


def test_layers_of_two_models_that_share_names_and_sizes_are_told_apart() -> None:
    for first, second in run_ranks(_same_names, 2, timeout=60):
        assert first.kind == "SyncNormMismatch", first
        assert "ranks [0] in 'norm1' call 3 forward C=8 float32 (a layer that first met at exchange #1," in first.text
        assert "ranks [1] in 'norm1' call 3 forward C=8 float32 (a layer that first met at exchange #17," in first.text
        assert second.kind == "completed"


def _versions(change: Callable[[], None] | None, level: str) -> Outcome:
    syncnorm.set_check(level)
    eps = 1e-3 if change is None and dist.get_rank() else 1e-5
    if change is not None and dist.get_rank():
        change()
    layer = syncnorm.SyncBatchNorm1d(3, eps=eps)
    return outcome(lambda: layer(torch.randn(4, 3)))


def _another_version() -> None:
    ledger.__version__ = "9.9.9"


def test_another_version_or_setting_is_named_where_all_else_is_alike() -> None:
    for kind, text, _ in run_ranks(_versions, 2, _another_version, "inline", timeout=60):
        assert kind == "SyncNormMismatch" and f"syncnorm {syncnorm.__version__}); ranks [1]" in text
        assert "syncnorm 9.9.9)" in text
    for kind, text, _ in run_ranks(_versions, 2, None, "full", timeout=60):
        assert kind == "SyncNormMismatch" and "ranks [1] in" in text and "eps=0.001" in text


def _elastic(state: dict[str, Tensor] | None, splits: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps on these shards of one batch, from a state; the state between and after them."""
    rank = dist.get_rank()
    net = network(convert=False).double()
    if state is not None:
        net.load_state_dict(state)
    syncnorm.convert(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    states = []
    for step in range(2):
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x.split(splits)[rank]).pow(2).sum().backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    return states[0], states[1]


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    begun, _ = run_ranks(_elastic, 4, None, [2, 0, 1, 3], timeout=60)[0]
    expected = None
    for splits in ([6], [1, 5], [3, 2, 1]):
        _, ended = run_ranks(_elastic, len(splits), begun, splits, timeout=60)[0]
        expected = expected or ended
        for name, value in ended.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def _forks(way: str, met: bool) -> str:
    syncnorm.set_watch(5.0 if way == "watched" else None)
    syncnorm.set_exchange("auto" if way == "watched" else way)
    net = network()
    if met:
        two_losses(net)
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, f"{outcome(lambda: two_losses(net))}".encode())
        for module in net.modules():
            if isinstance(module, syncnorm.SyncBatchNorm):
                module.process_group = 2
        os.write(writing, f"{outcome(lambda: two_losses(net))}".encode())
        os._exit(0)
    os.wait()
    two_losses(net)
    return os.read(reading, 2000).decode()


# Workers of a DataLoader come before the first step, mostly.
@pytest.mark.parametrize("met", [True, False], ids=["met", "has met nobody"])
@pytest.mark.parametrize("way", ["collective", "auto", "watched"])
def test_a_fork_of_a_rank_is_told_that_it_is_none(way: str, met: bool) -> None:
    for rank, said in enumerate(run_ranks(_forks, 2, way, met, group_timeout=10.0)):
        assert said.count("SyncNormError") == 2
        assert said.count(f"which is rank {rank}, and has no part in its process group") == 2
