"""Tier: gloo ranks. Rows of any length arrive whole; rows of two lengths, refused ones and other layers are an error on all."""

import re

import pytest
import torch
import torch.distributed as dist

import syncnorm
from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.errors import SyncNormMismatch
from syncnorm.testing import inject, run_ranks

pytestmark = pytest.mark.gloo

LENGTHS = [0, 1, 253, 254, 255, 1000]


def _arrive() -> list[bool]:
    group, rank = resolve(group_spec("world")), dist.get_rank()
    out = []
    for n in LENGTHS:
        for dtype in (torch.float64, torch.int64):
            rows = gather_rows(torch.arange(n, dtype=dtype) + 2**50 * (rank + 1), group)
            expected = torch.stack([torch.arange(n, dtype=dtype) + 2**50 * (r + 1) for r in range(3)])
            out.append(rows.dtype == dtype and torch.equal(rows, expected))
    return out


def test_rows_arrive_whole() -> None:
    assert run_ranks(_arrive, 3) == [[True] * 2 * len(LENGTHS)] * 3


def _differ(lengths: list[int | None]) -> list[str]:
    return [_one_gather(lengths[dist.get_rank()]) for _ in range(2)]  # the group still works after the first


def _one_gather(length: int | None) -> str:
    group = resolve(group_spec("world"))
    try:
        if length is None:
            send_refusal(7, torch.device("cpu"), group)
            return "refused"
        gather_rows(torch.zeros(length, dtype=torch.float64), group)
    except SyncNormMismatch as error:
        return str(error)
    return "no error"


def test_two_lengths_never_meet_on_the_wire() -> None:
    for lengths in ([3, 1000, 3], [5, 5, 4], [255, 256, 0]):
        for said in run_ranks(_differ, 3, lengths):
            assert len(said) == 2
            assert re.search(rf"ranks \[0.*\] in a gather of {lengths[0]} words", said[1])
            assert re.search(rf"ranks \[.*2\] in a gather of {lengths[2]} words", said[1])


def test_who_refused_is_named() -> None:
    first, second, third = run_ranks(_differ, 3, [1000, None, None])
    assert first[1].startswith(
        "2 of 3 ranks refused their input to this call (ranks [1, 2], at a gather of 1000 words)"
    )
    assert second == third == ["refused"] * 2


def _elsewhere(what: str) -> str:
    first, second, summing = syncnorm.RunningNorm(3), syncnorm.RunningNorm(3), syncnorm.SyncBatchNorm1d(3)
    for layer in (first, second, summing):
        layer(torch.randn(4, 3))
    other = {"another of its kind": second, "one that sums": summing}[what]
    try:
        (other if dist.get_rank() == 1 else first)(torch.randn(4, 3))
    except SyncNormMismatch as error:
        first(torch.randn(4, 3))  # the group still works
        return str(error)
    return "no error"


@pytest.mark.parametrize(("what", "place"), [
    ("another of its kind", r"RunningNorm \(first met at exchange #2\) call 2 gather of 7 words C=3"),
    ("one that sums", r"SyncBatchNorm1d \(first met at exchange #3\) call 2 forward C=3"),
])  # fmt: skip
def test_a_rank_in_another_layer_is_named(what: str, place: str) -> None:
    mine = r"RunningNorm \(first met at exchange #1\) call 2 gather of 7 words C=3 float64"
    for said in run_ranks(_elsewhere, 3, what):
        assert re.search(rf"ranks \[0, 2\] in {mine}; ranks \[1\] in {place}", said), said


def _killed() -> str:
    syncnorm.set_watch(20.0)
    layer = syncnorm.RunningNorm(3)
    layer(torch.randn(4, 3))
    try:
        with inject(layer, "kill", rank=2):
            layer(torch.randn(4, 3))
    except syncnorm.SyncNormPeerLost as error:
        return str(error)
    return "no error"


def test_a_killed_rank_is_named() -> None:
    for said in run_ranks(_killed, 3, lost=[2])[:2]:
        assert "ranks [2] are gone" in said and "call 2 gather of 7 words C=3 float64, exchange #2" in said
