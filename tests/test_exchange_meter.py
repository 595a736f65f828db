"""Tier: gloo ranks. Every collective of a layer is counted by whoever looks, with bytes and time; then nobody looks."""

import time

import pytest
import torch
import torch.distributed as dist

import syncnorm
from syncnorm.diagnostics._exchange_meter import ExchangeMeter
from syncnorm.distributed import observers
from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.testing import count_collectives, run_ranks

pytestmark = pytest.mark.gloo

ROW = 8 * 256  # bytes of a row by which ranks agree, as long as nothing needs more


def _counted(words: int) -> tuple[int, int, int]:
    group = resolve(group_spec("world"))
    with count_collectives() as counts, ExchangeMeter() as meter:
        gather_rows(torch.zeros(words, dtype=torch.float64), group)
    return meter.exchanges, meter.num_bytes, sum(counts.values())


def test_a_row_that_follows_the_agreement_is_counted_too() -> None:
    assert run_ranks(_counted, 2, 3) == [(1, ROW, 1)] * 2
    assert run_ranks(_counted, 2, 1000) == [(2, ROW + 8 * 1000, 2)] * 2


def _long_moments() -> tuple[int, int, int]:
    layer, x = syncnorm.SyncBatchNorm1d(3000), torch.randn(4, 3000)
    with count_collectives() as counts, ExchangeMeter() as meter:
        layer(x)
    return meter.exchanges, meter.num_bytes, sum(counts.values())


def test_moments_too_long_for_the_row_by_which_ranks_agree_go_by_themselves() -> None:
    assert run_ranks(_long_moments, 2) == [(2, ROW + 8 * 6001, 2)] * 2


def _meters_in_any_order() -> list[tuple[int, bool]]:
    layer, x = syncnorm.SyncBatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    first, second = ExchangeMeter(), ExchangeMeter()
    first.__enter__()
    layer(x)
    second.__enter__()
    if dist.get_rank() == 0:
        time.sleep(0.1)
    layer(x).sum().backward()
    first.__exit__(None, None, None)
    with pytest.raises((ValueError, syncnorm.SyncNormMismatch)):
        layer(x if dist.get_rank() else torch.randn(4, 5))  # one exchange, which fails
    second.__exit__(None, None, None)
    layer(x)
    assert not observers._observers
    return [(meter.exchanges, meter.seconds > (0.05 if dist.get_rank() else 0)) for meter in (first, second)]


def test_meters_begin_and_end_in_any_order_and_count_what_fails() -> None:
    assert run_ranks(_meters_in_any_order, 2) == [[(3, True), (3, True)]] * 2
