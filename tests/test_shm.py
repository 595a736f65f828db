"""Tier: gloo ranks. Rows over shared memory: the sums of gloo to the bit, and a name for every peer that does not come."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import syncnorm
from syncnorm.distributed import GroupSpec, make_subgroups, resolve
from syncnorm.distributed.groups import Group
from syncnorm.distributed.wire import _ways, describe, set_exchange, shm, sum_row
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormPeerLost, SyncNormTimeout
from syncnorm.kernels import native
from syncnorm.kernels.native import _build
from syncnorm.testing import RankError, run_ranks

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(_build.compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory is for Linux"),
]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    native.build()


def _world() -> Group:
    set_exchange("shm")  # by name: a test that quietly took gloo would show nothing
    return resolve(GroupSpec())


def _segment(group: Group) -> shm.Segment:
    ways = _ways[dist.distributed_c10d._resolve_process_group(group.name)]
    carrier = ways["cpu"].carrier
    assert isinstance(carrier, shm.Segment)
    return carrier


# ------------------------------------------------------------------------------------------------------------- the sums


def _random_rows(rounds: int) -> None:
    group, rank = _world(), dist.get_rank()
    sizes, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(rank)
    for _ in range(rounds):
        sent, got = [], []
        for number in range(50):
            # Mostly as layers have them, some empty, and some longer than two slots.
            size = int(torch.randint(0, 40_000 if number == 0 else 600, (1,), generator=sizes)) * (number != 1)
            row = torch.randn(size, generator=own, dtype=torch.float64) * 10.0 ** (number % 7)
            sent.append(row.clone())
            got.append(sum_row(row, group))
        mine, ours = torch.cat(sent), torch.cat(got)
        rows = [torch.empty_like(mine) for _ in range(group.size)]
        dist.all_gather(rows, mine)
        total = rows[0] + rows[1]
        for row in rows[2:]:  # three numbers have as many sums as orders: that of the ranks is promised
            total += row
        assert torch.equal(ours, total)
        if group.size == 2:
            dist.all_reduce(mine)
            assert torch.equal(ours, mine)


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 40), (3, 6), (4, 4)])
def test_rows_sum_as_over_gloo(ranks: int, rounds: int) -> None:
    run_ranks(_random_rows, ranks, rounds)


def _late_rows() -> list[float]:
    group, seen = _world(), []
    for number in range(6):  # past the spinning, the yielding, and the first looks at who is missing
        time.sleep(0.12 * (number % 2 == dist.get_rank()))
        seen.append(float(sum_row(torch.tensor([1.0 + number, 0.0], dtype=torch.float64), group)[0]))
    return seen


def test_a_late_rank_is_waited_for() -> None:
    assert run_ranks(_late_rows, 2) == [[2.0 * (1 + number) for number in range(6)]] * 2


def _woken() -> float:
    group, row = _world(), torch.zeros(3, dtype=torch.float64)
    sum_row(row, group)
    began = time.monotonic()
    for _ in range(40):
        time.sleep(0.005 * dist.get_rank())
        sum_row(row, group)
    return time.monotonic() - began


def test_who_sleeps_is_woken() -> None:
    # A rank that nobody wakes looks again after 50 ms: 2 s for 40 exchanges, where they take 0.2 s.
    assert max(run_ranks(_woken, 2)) < 1.5


def _subgroups() -> tuple[float, float]:
    whole, rank = _world(), dist.get_rank()
    crossing = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    assert isinstance(crossing, dist.ProcessGroup)
    groups = [whole, Group(crossing.group_name, 2), Group(make_subgroups(2).group_name, 2)]
    if rank == 3:
        time.sleep(0.3)  # its partners agree first, with it, and it with each of them in the same order
    return tuple(float(sum_row(torch.tensor([10.0**rank], dtype=torch.float64), group)) for group in groups)


def test_each_group_has_memory_of_its_own() -> None:
    crossing, neighbours = [101.0, 1010.0], [11.0, 1100.0]
    assert run_ranks(_subgroups, 4) == [(1111.0, crossing[rank % 2], neighbours[rank // 2]) for rank in range(4)]


def _two_threads() -> list[float]:
    groups = [_world(), Group(dist.new_group([0, 1]).group_name, 2)]
    totals = [torch.zeros(1, dtype=torch.float64) for _ in groups]

    def work(place: int) -> None:
        for number in range(200):
            totals[place] += sum_row(torch.full((5,), float(number + place), dtype=torch.float64), groups[place])[:1]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [float(total) for total in totals]


def test_threads_with_a_group_each_do_not_meet() -> None:
    assert run_ranks(_two_threads, 2) == [[39800.0, 40200.0]] * 2


# ------------------------------------------------------------------------------------------------- peers that do not come


def _first(group: Group) -> None:
    assert sum_row(torch.ones(3, dtype=torch.float64), group)[0] == dist.get_world_size()


def _twice(group: Group) -> None:
    for _ in range(2):
        sum_row(torch.ones(3, dtype=torch.float64), group)


def _one_dies(victim: int) -> None:
    group = _world()
    _first(group)
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        sum_row(torch.ones(3, dtype=torch.float64), group)
    finally:
        assert time.monotonic() - began < 2.0  # the claim is one second; cores are shared here


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (3, 1)])
def test_a_killed_rank_is_named_by_all_others(ranks: int, victim: int) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_one_dies, ranks, victim)
    errors = caught.value.errors
    assert set(errors) == set(range(ranks)) and "exit code -9" in errors.pop(victim)
    for text in errors.values():
        # Who sees another survivor leave first names that one; it is the truth, and the other names the dead.
        assert "SyncNormPeerLost: rank" in text
    assert any(f"rank {victim} is gone (process " in text for text in errors.values())


def _one_stops() -> tuple[str, str]:
    group = _world()
    _first(group)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    began, pid = time.monotonic(), _segment(group)._processes[1][0]
    try:
        with pytest.raises((SyncNormTimeout, SyncNormPeerLost)) as caught:
            _twice(group)  # what rank 0 had sent before it gave up is valid
        assert dist.get_rank() == 1 or 0.9 < time.monotonic() - began < 3.0
    finally:
        if dist.get_rank() == 0:
            os.kill(pid, signal.SIGCONT)
    with pytest.raises(SyncNormError, match=r"an earlier exchange of this process group failed \(rank"):
        sum_row(torch.ones(3, dtype=torch.float64), group)
    return type(caught.value).__name__, str(caught.value)


def test_a_stopped_rank_is_named_at_the_groups_time_limit() -> None:
    (waited, why), (thawed, left) = run_ranks(_one_stops, 2, group_timeout=1.0)
    assert waited == "SyncNormTimeout" and why.startswith("rank 1 is stopped (process ")
    assert "did not come to an exchange within 1 s, the time limit of the process group" in why
    assert thawed == "SyncNormPeerLost" and left.startswith("rank 0 has left its process group")


def _one_leaves(how: str) -> str:
    group = _world()
    _first(group)
    if dist.get_rank() == 1:
        if how == "destroys the group":
            dist.destroy_process_group()
        else:
            signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            signal.setitimer(signal.ITIMER_REAL, 0.02 if how == "is interrupted at once" else 0.2)
            with pytest.raises(KeyboardInterrupt):
                sum_row(torch.ones(3, dtype=torch.float64), group)
        return ""
    time.sleep(0.6)
    with pytest.raises(SyncNormPeerLost) as caught:
        _twice(group)  # what rank 1 had sent before it was interrupted is valid
    return str(caught.value)


@pytest.mark.parametrize("how", ["destroys the group", "is interrupted at once", "is interrupted"])
def test_a_rank_that_leaves_is_named_at_once(how: str) -> None:
    try:
        said = run_ranks(_one_leaves, 2, how)[0]
    except RankError as error:  # the destroyed group has no barrier at the end
        pytest.fail(str(error))
    assert said.startswith("rank 1 has left its process group")


def _other_lengths() -> list[str]:
    group, said = _world(), []
    for mine in ([7, 9], [20_000, 5], [3, 0]):
        row = torch.ones(mine[dist.get_rank()], dtype=torch.float64)
        with pytest.raises(SyncNormMismatch) as caught:
            sum_row(row, group)
        assert torch.equal(row, torch.ones_like(row))
        said.append(str(caught.value))
        _first(group)  # and the group still works
    return said


def test_rows_of_different_lengths_are_named_on_all_ranks() -> None:
    first, second = run_ranks(_other_lengths, 2)
    assert first == second
    assert [text.partition("exchange: ")[2].partition(" (words")[0] for text in first] == [
        "{0: 7, 1: 9}", "{0: 20000, 1: 5}", "{0: 3, 1: 0}",
    ]  # fmt: skip


def _forks() -> str:
    group = _world()
    _first(group)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sum_row(torch.ones(3, dtype=torch.float64), group)
        except SyncNormError as error:
            os.write(writing, str(error).encode())
        _ways.clear()  # as garbage collection may: the parent has not left
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.2 * dist.get_rank())  # so that rank 0 looks whether this one has left
    _first(group)
    return os.read(reading, 1000).decode()


def test_a_fork_has_no_part_in_the_group() -> None:
    for rank, said in enumerate(run_ranks(_forks, 2)):
        assert f"which is rank {rank}, and has no part in its process group" in said, said


# --------------------------------------------------------------------------------------------------- what it leaves behind


def _descriptors_and_maps() -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text().count("memfd:syncnorm")
    return len(os.listdir("/proc/self/fd")), maps


def _agrees_again() -> tuple[int, int, int, int]:
    group = _world()
    _first(group)
    before = _descriptors_and_maps()
    for number in range(20):
        set_exchange("collective" if number % 2 else "shm")
        _first(group)
    set_exchange("shm")
    _first(group)
    return *before, *_descriptors_and_maps()


def test_agreeing_again_leaves_neither_files_nor_memory() -> None:
    for descriptors, maps, later_descriptors, later_maps in run_ranks(_agrees_again, 2):
        assert (later_descriptors, later_maps) == (descriptors, maps) and maps == 1


def _dies_while_agreeing(victim: int) -> None:
    def dies(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if (
        dist.get_rank() == victim
    ):  # the first rank with the memory made and nobody else in it; or the other, before it is
        if victim == 0:
            shm.Shared.probe = dies
        else:
            shm.attach = dies
    _first(_world())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_crash_while_agreeing_leaves_nothing_and_is_bounded(victim: int) -> None:
    before = {name for name in os.listdir("/dev/shm") if "syncnorm" in name}
    with pytest.raises(RankError, match="within 1 s, its time limit"):
        run_ranks(_dies_while_agreeing, 2, victim, group_timeout=1.0)
    assert {name for name in os.listdir("/dev/shm") if "syncnorm" in name} == before == set()


def _made_again(folder: str) -> list[str]:
    rank, said = dist.get_rank(), []
    for number in range(4):
        group = _world()
        total = sum_row(torch.tensor([float(number), 1.0], dtype=torch.float64), group)
        assert total.tolist() == [2.0 * number, 2.0]
        said.append(f"{group.name} {describe(group.name, 'cpu')}")
        dist.barrier()
        dist.destroy_process_group()
        store = dist.FileStore(f"{folder}/{number}", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return said


def test_a_group_made_again_under_its_name_agrees_anew(tmp_path: Path) -> None:
    for said in run_ranks(_made_again, 2, str(tmp_path)):
        assert set(said) == {"0 shm: 2 ranks share memory on one host"}


def _a_layer() -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4 + dist.get_rank(), 3, 5, dtype=torch.float64)
    out = {}
    for exchange in ("shm", "collective"):
        set_exchange(exchange)
        layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
        z = x.clone().requires_grad_()
        y = layer(z)
        y.pow(3).sum().backward()
        out[exchange] = [y.detach(), z.grad, layer.running_mean, layer.running_var]
    return out


def test_a_layer_is_the_same_over_both() -> None:
    for per_rank in run_ranks(_a_layer, 2):
        for mine, theirs in zip(per_rank["shm"], per_rank["collective"], strict=True):
            assert torch.equal(mine, theirs)
