"""Tier: gloo ranks. Rows of any length arrive whole; rows of two lengths, and refused ones, are an error on every rank."""

import pytest
import torch
import torch.distributed as dist

from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.errors import SyncNormMismatch
from syncnorm.testing import run_ranks

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
            assert f"{lengths[0]} words on ranks [0" in said[1]
            assert f"{lengths[2]} words on ranks" in said[1]


def test_who_refused_is_named() -> None:
    first, second, third = run_ranks(_differ, 3, [1000, None, None])
    assert first[1].startswith("2 of 3 ranks refused their data (ranks [1, 2])")
    assert second == third == ["refused"] * 2
