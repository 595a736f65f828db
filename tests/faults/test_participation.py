"""Tier: gloo ranks. A rank that takes part in another way than the others is named on every rank, and all go on."""

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import FaultInjected, inject, run_ranks
from tests.faults.network import Outcome, batch, network, outcome, two_losses

pytestmark = pytest.mark.gloo

VICTIM, RANKS = 1, 3


def _on(fault: Any, **options: Any) -> Callable[[Any], None]:
    def step(net: Any) -> None:
        with inject(net, fault, rank=VICTIM, **options):
            two_losses(net)

    return step


def _swallowed(net: Any) -> None:
    """A user's loop that goes on with the next batch after an exception."""
    with inject(net, "raise", layer="norm2", rank=VICTIM):
        for seed in range(3):
            with suppress(FaultInjected):
                net(batch(seed))


def _other_order(net: Any) -> None:
    """Modules in the order of a set, which differs between processes."""
    h = net.linear1(batch())
    for name in ("norm2", "norm1") if dist.get_rank() == VICTIM else ("norm1", "norm2"):
        h = net.get_submodule(name)(h)


def _other_loss(net: Any) -> None:
    """A rank that leaves one of two losses out, and meets the next step."""
    with inject(net, "no_backward", call=2, rank=VICTIM):
        two_losses(net)
        two_losses(net)


def _places(right: str, wrong: str) -> str:
    return rf"ranks are in different places: ranks \[0, 2\] in {right}.*; ranks \[1\] in {wrong}"


N = r"call \d+"
# What happens, and what all ranks are told.
CASES: dict[str, tuple[Callable[[Any], None], str]] = {
    "skip": (_on("skip", layer="norm2"), _places(f"'norm2' {N} forward C=8 float32", f"'norm3' {N} forward C=5 float32")),
    "extra": (_on("extra", layer="norm1"), _places(f"'norm2' {N} forward C=8", f"'norm1' {N} forward C=8")),
    "eval": (_on("eval", layer="norm3"), _places(f"'norm3' {N} forward C=5", f"'norm4' {N} forward C=8")),
    "eval of all": (_on("eval", call=2), _places(f"'norm1' {N} forward", f"'norm4' {N} backward")),
    "exception swallowed": (_swallowed, _places(f"'norm2' {N} forward", f"'norm1' {N} forward")),
    "channels": (_on("channels", layer="norm4"), _places(f"'norm4' {N} forward C=8", f"'norm4' {N} forward C=7")),
    "bad input": (
        _on("bad_input", layer="norm4"),
        rf"1 of 3 ranks refused their input to this call \(ranks \[1\], at 'norm4' {N} forward C=8 float32\)",
    ),
    "dtype": (_on("dtype", layer="norm3"), _places(f"'norm3' {N} forward C=5 float32", f"'norm3' {N} forward C=5 float64")),
    "swap": (_on("swap", layer="norm1", other="norm2"), _places(f"'norm1' {N} forward", f"'norm2' {N} forward")),
    "order of modules": (_other_order, _places(f"'norm1' {N} forward", f"'norm2' {N} forward")),
    "order of backwards": (_on("backward_order"), _places(f"'norm4' {N} backward", f"'norm4' {N} backward")),
    "a loss left out": (_other_loss, _places(f"'norm4' {N} backward", f"'norm1' {N} forward")),
    "no_grad": (
        _on("no_grad", layer="norm2"),
        rf"2 of 3 ranks need a backward pass through this call \(ranks \[0, 2\], at 'norm2' {N} .*\) and ranks \[1\] do not",
    ),
}  # fmt: skip


def _participate() -> dict[str, tuple[Outcome, Outcome]]:
    """Each case, and a step without a fault after it."""
    net, found = network(), {}
    for name, (step, _) in CASES.items():
        found[name] = outcome(lambda step=step: step(net)), outcome(lambda: two_losses(net))
    return found


@functools.cache
def participate() -> list[dict[str, tuple[Outcome, Outcome]]]:
    return run_ranks(_participate, RANKS, timeout=60)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_elsewhere_is_named_on_all_ranks_and_the_next_step_is_as_ever(case: str) -> None:
    for rank, found in enumerate(participate()):
        (kind, text, seconds), after = found[case]
        if case == "bad input" and rank == VICTIM:
            assert (kind, text) == (
                "ValueError", "SyncBatchNorm1d(8): expected 8 channels in dim 1, got an input [4, 7].",
            )  # fmt: skip
        else:
            assert kind == "SyncNormMismatch" and re.search(CASES[case][1], text), (kind, text)
        assert seconds < 5 and after.kind == "completed", (seconds, after)


def _ddp(fault: str) -> Outcome:
    syncnorm.set_watch(2.5)
    net = network()
    net.append(nn.Linear(8, 8))
    # Small buckets: some are under way when a norm notices.
    wrapped = DistributedDataParallel(net, bucket_cap_mb=1e-5, broadcast_buffers=False)

    def steps() -> None:
        for step in range(4):
            alone = fault == "no_sync" and step == 1 and dist.get_rank() == VICTIM
            with wrapped.no_sync() if alone else nullcontext():
                wrapped(batch(step)).sum().backward()

    if fault == "no_sync":
        return outcome(steps)
    with inject(net, "no_backward", call=2, rank=VICTIM):
        return outcome(steps)


@pytest.mark.parametrize("fault", ["no_sync", "no backward under DDP"])
def test_ranks_out_of_step_with_ddp(fault: str) -> None:
    # The buckets of DDP are not ours: a rank that waits in one gets gloo's error. No process is aborted, and where a norm is
    # what notices, it names the ranks. The other rank is not waited for: gloo's error is late.
    if fault == "no_sync":
        kind, text, _ = run_ranks(_ddp, 2, fault, timeout=60, lost=[0])[VICTIM]
        assert kind == "SyncNormTimeout" and "ranks [0] run code outside of synchronised layers" in text, (kind, text)
        assert "Waited" in text and "in 'norm1' call 3 forward C=8 float32" in text
        return
    kind, text, _ = run_ranks(_ddp, 2, fault, timeout=60, lost=[VICTIM])[0]
    assert kind == "SyncNormMismatch", (kind, text)
    assert re.search(rf"ranks \[0\] in 'norm4' {N} backward.*; ranks \[1\] in 'norm1' {N} forward", text)
