"""Tier: gloo ranks. The way of the rows: agreed by all ranks of a group from what each knows, or refused on all alike."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncnorm
from syncnorm.distributed import GroupSpec, resolve
from syncnorm.distributed.wire import describe, handshake, set_exchange, shm, sum_row
from syncnorm.distributed.wire.crowding import crowded
from syncnorm.distributed.wire.handshake import Facts, decide
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormPeerLost, SyncNormTimeout
from syncnorm.kernels import native
from syncnorm.kernels.native import _build
from syncnorm.testing import RankError, count_collectives, run_ranks

needs_shm = pytest.mark.skipif(
    _build.compiler() is None or not hasattr(os, "memfd_create"), reason="needs Linux and a C++ compiler"
)

# ------------------------------------------------------------------------------------------------------------ the decision


def _facts(
    asked: str = "auto", host: str = "a", threads: int = 1, cores: str = "3", objection: str | None = None
) -> Facts:
    return Facts(asked, host, (1, "1"), threads, cores, objection)


@pytest.mark.parametrize(
    ("told", "way", "why"),
    [
        ([_facts(), _facts()], "shm", "2 ranks share memory on one host"),
        ([_facts("symmetric")] * 2, "symmetric", "asked for by name"),
        (
            [_facts("symmetric"), _facts("symmetric", host="b")],
            "refused",
            "symmetric: ranks 4 and 7 are on different hosts.",
        ),
        ([_facts(), _facts(host="b")], "collective", "shm: ranks 4 and 7 are on different hosts."),
        ([_facts(), _facts(objection="no.")], "collective", "shm: rank 7: no."),
        ([_facts("shm"), _facts("shm", objection="no.")], "refused", "shm: rank 7: no."),
        ([_facts("collective"), _facts("collective")], "collective", "asked for by name"),
        (
            [_facts("auto"), _facts("shm")],
            "mismatch",
            "ranks of one group were asked for different exchanges: 'auto' on rank 4, 'shm' on rank 7. Set the same on all "
            "of them (syncnorm.set_exchange, SYNCNORM_EXCHANGE).",
        ),
        (
            [_facts(), _facts()._replace(check="off")],
            "mismatch",
            "ranks of one group compare at different levels: 'inline' on rank 4, 'off' on rank 7. Set the same on all of them "
            "(syncnorm.set_check, SYNCNORM_CHECK).",
        ),
    ],
)
def test_the_decision(told: list[Facts], way: str, why: str) -> None:
    assert decide(told, [4, 7]) == (way, why)


def test_threads_are_counted_by_host_against_the_cores_of_all_its_ranks() -> None:
    assert crowded([_facts(threads=2, cores="3"), _facts(threads=2, cores="c")]) == {}  # four cores, two each
    told = [_facts(host="b"), _facts(threads=2), _facts(threads=1), _facts(host="b")]
    assert crowded(told) == {1: (2, 3, 2)}


# ------------------------------------------------------------------------------------------------------------- the setting


@pytest.mark.gloo
def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"set_exchange takes one of \['auto', 'collective', 'shm', 'symmetric'\], got 'nvlink'"
    ):
        set_exchange("nvlink")  # type: ignore[arg-type]
    with pytest.raises(
        RankError, match=r"SYNCNORM_EXCHANGE is one of \['auto', 'collective', 'shm', 'symmetric'\], got 'gloo'"
    ):
        run_ranks(_sum_under, 2, {"SYNCNORM_EXCHANGE": "gloo"})


def test_what_was_set_can_be_put_back() -> None:
    assert syncnorm.set_exchange("collective") is None
    assert syncnorm.set_exchange("shm") == "collective"
    assert syncnorm.set_exchange(None) == "shm"
    assert syncnorm.set_exchange(None) is None


def _sum_under(environment: dict[str, str]) -> tuple[str, dict[str, int]]:
    os.environ.update(environment)
    group = resolve(GroupSpec())
    with count_collectives() as counts:
        assert sum_row(torch.ones(3, dtype=torch.float64), group).tolist() == [2.0] * 3
    return describe(group.name, "cpu"), counts


@pytest.mark.gloo
def test_the_environment_says_it_from_outside() -> None:
    assert (
        run_ranks(_sum_under, 2, {"SYNCNORM_EXCHANGE": "collective"})
        == [("collective: asked for by name", {"all_reduce": 1})] * 2
    )


@pytest.mark.gloo
@needs_shm
def test_auto_shares_memory_where_it_can_and_says_so() -> None:
    native.build()
    assert run_ranks(_sum_under, 2, {}) == [("shm: 2 ranks share memory on one host", {"all_reduce": 1})] * 2


# ------------------------------------------------------------------------------------------------- refused, or not, by all


def _sum_with(asked: list[Any], change: Callable[[], None] | None = None, victim: int = 1) -> tuple[str, str, str]:
    """What a first exchange ends in, how the rows travel then, and what comes of a second exchange, over gloo."""
    if change is not None and dist.get_rank() == victim:
        change()
    group, outcome = resolve(GroupSpec()), ""
    set_exchange(asked[dist.get_rank() % len(asked)])
    try:
        sum_row(torch.ones(3, dtype=torch.float64), group)
    except SyncNormError as error:
        outcome = f"{type(error).__name__}: {error}"
    how = describe(group.name, "cpu")
    set_exchange("collective")
    return outcome, how, str(sum_row(torch.ones(1, dtype=torch.float64), group).tolist())


def _no_operators() -> None:
    shm.native.load = lambda: "the native operators are not built."


def _another_host() -> None:
    mine = handshake.facts
    handshake.facts = lambda *asked: mine(*asked)._replace(host="elsewhere", objection=None)


def _out_of_reach() -> None:
    def attach(*_: Any) -> Any:
        raise PermissionError("out of reach")

    shm.attach = attach


def _not_the_same_memory() -> None:
    shm.Shared.probe = lambda *_: None


_HARM = {
    _no_operators: "rank 1: the native operators are not built.",
    _another_host: "ranks 0 and 1 are on different hosts.",
    _out_of_reach: "rank 1: out of reach.",
    _not_the_same_memory: "what rank 1 wrote did not arrive.",
}


@pytest.mark.gloo
@needs_shm
@pytest.mark.parametrize("harm", list(_HARM), ids=lambda harm: harm.__name__.strip("_"))
def test_one_rank_that_cannot_share_memory(harm: Callable[[], None]) -> None:
    native.build()
    for outcome, how, again in run_ranks(_sum_with, 2, ["auto"], harm):
        assert (outcome, how, again) == ("", f"collective: shm: {_HARM[harm]}", "[2.0]")
    named = run_ranks(_sum_with, 2, ["shm"], harm)
    assert named[0][0] == named[1][0]
    assert named[0][0] == (
        f'SyncNormError: the exchange "shm" was asked for by name and is impossible here: shm: {_HARM[harm]} Use "auto" or '
        '"collective" (syncnorm.set_exchange, SYNCNORM_EXCHANGE).'
    )
    assert named[0][2] == named[1][2] == "[2.0]"  # nobody is out of step


@pytest.mark.gloo
def test_ranks_asked_for_different_things_raise_alike() -> None:
    first, second, third = run_ranks(_sum_with, 3, ["auto", "auto", "collective"])
    assert first[0] == second[0] == third[0]
    assert first[0].startswith(
        "SyncNormMismatch: ranks of one group were asked for different exchanges: 'auto' on rank 0, 'co"
    )
    assert first[2] == "[3.0]"


def _compares_otherwise(watch: float | None) -> str:
    os.environ["SYNCNORM_CHECK"] = ["inline", "off"][dist.get_rank()]
    syncnorm.set_watch(watch)
    set_exchange("collective")  # where rows of two lengths end a healthy process
    layer = syncnorm.SyncBatchNorm1d(4)
    with pytest.raises(SyncNormMismatch) as caught:
        layer(torch.randn(3, 4))
    syncnorm.set_check("off")
    layer(torch.randn(3, 4))
    return str(caught.value)


@pytest.mark.gloo
@pytest.mark.parametrize("watch", [None, 10.0])
def test_ranks_that_compare_at_different_levels_raise_alike(watch: float | None) -> None:
    for text in run_ranks(_compares_otherwise, 2, watch):
        assert "ranks of one group compare at different levels: 'inline' on rank 0, 'off' on rank 1" in text


def _set_otherwise(start: tuple[Any, str], change: tuple[str, str], watch: float | None) -> tuple[str, str, bool]:
    setter, value = getattr(syncnorm, change[0]), change[1]
    syncnorm.set_watch(watch)
    syncnorm.set_exchange(start[0])
    syncnorm.set_check(start[1])
    layer, x = syncnorm.SyncBatchNorm1d(4), torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    before = layer.running_mean.clone()
    if dist.get_rank() == 1:
        setter(value)
    texts, another = [], syncnorm.SyncBatchNorm1d(4)
    for each in (layer, another):  # as long as it lasts
        with pytest.raises(SyncNormMismatch) as caught:
            each(x)
        texts.append(str(caught.value))
    untouched = torch.equal(layer.running_mean, before)
    setter(start[change[0] == "set_check"])  # what it was
    layer(x).sum().backward()
    setter(value)
    another(x).sum().backward()
    return texts[0], texts[1], untouched


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("start", "change", "watch"),
    [
        (("collective", "inline"), ("set_check", "off"), None),
        (("collective", "inline"), ("set_check", "full"), None),
        (("auto", "inline"), ("set_exchange", "collective"), None),
        (("collective", "full"), ("set_exchange", "auto"), None),
        (("collective", "inline"), ("set_check", "off"), 10.0),
    ],
)
def test_a_rank_that_is_set_otherwise_alone_is_named(
    start: tuple[Any, str], change: tuple[str, str], watch: float | None
) -> None:
    now = {"set_exchange": start[0], "set_check": start[1], **dict([change])}
    says = f"ranks [1] in a change to the exchange {now['set_exchange']!r} and the check {now['set_check']!r}"
    for *texts, untouched in run_ranks(_set_otherwise, 2, start, change, watch, group_timeout=10.0):
        assert untouched and all(says in text and "ranks [0] in SyncBatchNorm1d" in text for text in texts)


def _compares_alone() -> str:
    syncnorm.set_exchange("collective")
    syncnorm.set_check("off")
    layer, x = syncnorm.SyncBatchNorm1d(4), torch.randn(3, 4)
    layer(x)
    if dist.get_rank():
        syncnorm.set_check("inline")
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    return str(caught.value)


@pytest.mark.gloo
def test_a_rank_that_compares_alone_ends_no_process() -> None:
    _, text = run_ranks(_compares_alone, 2, group_timeout=2.0, lost=[0])
    assert "ranks [0] did not come to the first exchange of the process group of ranks [0, 1] within 2 s" in text


def _absent(missing: int) -> tuple[float, str]:
    if dist.get_rank() == missing:
        time.sleep(2.5)
    began = time.monotonic()
    with pytest.raises(SyncNormTimeout) as caught:
        sum_row(torch.ones(3, dtype=torch.float64), resolve(GroupSpec()))
    return time.monotonic() - began, str(caught.value)


@pytest.mark.gloo
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_does_not_come_to_agree_is_named_at_the_time_limit(missing: int) -> None:
    outcomes = run_ranks(_absent, 3, missing, group_timeout=1.0)
    for rank, (seconds, text) in enumerate(outcomes):
        if rank != missing:
            assert 0.9 < seconds < 2.2
            assert text.startswith(
                f"ranks [{missing}] did not come to the first exchange of the process group of ranks [0, 1,"
            )


def _interrupted(victim: int) -> tuple[float, str]:
    group, began = resolve(GroupSpec()), time.monotonic()
    if dist.get_rank() == victim:
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    if dist.get_rank() == 2:
        time.sleep(1)
    with pytest.raises((SyncNormPeerLost, KeyboardInterrupt)) as caught:
        sum_row(torch.ones(3, dtype=torch.float64), group)
    seconds = time.monotonic() - began
    time.sleep(2 * (dist.get_rank() == victim))  # it lives
    return seconds, str(caught.value)


@pytest.mark.gloo
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_interrupted_while_all_agree_is_named_at_once(victim: int) -> None:
    outcomes = run_ranks(_interrupted, 3, victim, group_timeout=20)
    for seconds, text in outcomes[:victim] + outcomes[victim + 1 :]:
        assert text.startswith(
            f"rank {victim} was interrupted (KeyboardInterrupt) at the first exchange of the process"
        )
        assert seconds < 5


def _killed_while_all_agree(victim: int) -> tuple[float, str]:
    group = resolve(GroupSpec())
    if dist.get_rank() == victim:
        threading.Timer(0.5, os._exit, [1]).start()
    if dist.get_rank() == 2:
        time.sleep(2)
    began = time.monotonic()
    with pytest.raises(SyncNormPeerLost) as caught:
        sum_row(torch.ones(3, dtype=torch.float64), group)
    return time.monotonic() - began, str(caught.value)


@pytest.mark.gloo
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_all_agree_is_named(victim: int) -> None:
    outcomes = run_ranks(_killed_while_all_agree, 3, victim, group_timeout=20, lost=[victim])
    for seconds, text in outcomes[:victim] + outcomes[victim + 1 :]:
        assert text.startswith(f"rank {victim} is gone (process ") and seconds < 6
        assert "has ended) at the first exchange of the process group of ranks [0, 1, 2], and does not come." in text


def test_groups_of_other_backends_have_the_collective() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        group = resolve(GroupSpec())
        sum_row(torch.ones(3, dtype=torch.float64), group)
        assert describe(group.name, "cpu") == "collective: groups of 'fake' have nothing else"
        set_exchange("shm")
        with pytest.raises(SyncNormError, match=r'"shm" was asked for by name and is not made for groups of \'fake\''):
            sum_row(torch.ones(3, dtype=torch.float64), group)
    finally:
        set_exchange(None)
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- too many threads


def _warned() -> list[str]:
    torch.set_num_threads(1 + os.cpu_count())  # type: ignore[operator]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for exchange in ("collective", "auto"):
            set_exchange(exchange)
            sum_row(torch.ones(3, dtype=torch.float64), resolve(GroupSpec()))
    return [str(w.message) for w in caught if "share" in str(w.message)]


@pytest.mark.gloo
def test_more_threads_than_cores_warns_once_with_what_to_do() -> None:
    (text,), nothing = run_ranks(_warned, 2)
    assert nothing == []  # one warning for a host
    cores = len(os.sched_getaffinity(0))
    assert f"2 ranks with {2 * (1 + os.cpu_count())} threads in all share {cores} cores" in text  # type: ignore[operator]
    assert f"set OMP_NUM_THREADS={max(1, cores // 2)}" in text


# ------------------------------------------------------------------------------------------------- eager and compiled ranks


def _steps(layer: torch.nn.Module, forward: Any) -> list[torch.Tensor]:
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(4 * (1 - dist.get_rank()), 3, 5, dtype=torch.float64, requires_grad=True)
        forward(x).pow(3).sum().backward()
    return [b.clone() for b in layer.buffers()]


def _eager_beside_compiled() -> list[torch.Tensor]:
    set_exchange("collective")
    syncnorm.set_check("off")  # a graph has no words of agreement, and an eager rank would notice
    layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
    return _steps(layer, torch.compile(layer, fullgraph=True, backend="aot_eager") if dist.get_rank() else layer)


@pytest.mark.gloo
def test_a_compiled_rank_meets_an_eager_one_over_the_collective() -> None:
    eager, compiled = run_ranks(_eager_beside_compiled, 2, timeout=90)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def _compiled_beside_itself() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*(syncnorm.SyncBatchNorm1d(3, dtype=torch.float64) for _ in range(3)))
        states.append(_steps(layers, torch.compile(layers, fullgraph=True) if compiled else layers))
    return states[0], states[1]


@pytest.mark.gloo
@pytest.mark.slow
def test_the_exchanges_of_a_graph_of_inductor_stay_in_their_order_on_a_rank_without_samples() -> None:
    for eager, compiled in run_ranks(_compiled_beside_itself, 2, timeout=110):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-10, atol=1e-10)
