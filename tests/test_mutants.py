"""Tier: gloo ranks. The numeric tests can fail: each load-bearing term is taken away once, and they notice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.core.moments import Moments, from_sums, to_sums
from syncnorm.core.running import RunningStatistics
from syncnorm.distributed import row
from syncnorm.distributed.groups import Group
from syncnorm.functional import _batch_backward, _batch_normalize, _whole
from syncnorm.testing import run_ranks
from tests.oracles import step_errors

pytestmark = pytest.mark.gloo


def _no_count_weighting() -> None:
    # Every rank counts the same, as in implementations that average the ranks' statistics.
    def equal(moments: Moments) -> Tensor:
        return to_sums(Moments(1.0, moments.mean, moments.m2 / max(float(moments.count), 1.0)))

    _sums_of_moments(equal, from_sums)


def _no_between_rank_term() -> None:
    # M2 of the union without n·(mean - mean)²: the spread between ranks is forgotten.
    def within(moments: Moments) -> Tensor:
        total = moments.mean * moments.count
        return torch.cat([torch.tensor([moments.count], dtype=torch.float64), total, moments.m2])

    def parts(sums: Tensor, count: float | None = None) -> Moments:
        zeros = from_sums(sums, count)
        return zeros._replace(m2=sums[1:].view(2, -1)[1])

    _sums_of_moments(within, parts)


def _sums_of_moments(to: Callable[..., Tensor], back: Callable[..., Moments]) -> None:
    row.to_sums, row.from_sums, row._native = to, back, lambda t: False


def _no_backward_exchange() -> None:
    def local(sums: Tensor, count: float, *_: Any) -> Tensor:
        return sums / count

    _batch_backward.exchange_means = local


def _no_forward_exchange() -> None:
    real = _batch_normalize.exchange_moments

    def local(moments: Moments, group: Group, **flags: Any) -> Moments:
        return real(moments, replace(group, size=1), **flags)

    _batch_normalize.exchange_moments = local


def _no_exchange() -> None:
    _no_forward_exchange()
    _no_backward_exchange()


def _biased_running_var() -> None:
    real = _batch_normalize.update_running

    def biased(running: RunningStatistics, batch: Moments, backend: str) -> None:
        real(running, batch._replace(m2=batch.m2 * (batch.count - 1) / batch.count), backend)

    _batch_normalize.update_running = biased


def _local_count_in_backward() -> None:
    real = _batch_backward.exchange_means

    def too_large(sums: Tensor, count: float, group: Group, *rest: Any) -> Tensor:
        return real(sums, count / group.size, group, *rest)  # as if divided by this rank's share of the count

    _batch_backward.exchange_means = too_large


MUTANTS = [
    _no_count_weighting, _no_between_rank_term, _no_backward_exchange, _no_forward_exchange, _no_exchange, _biased_running_var,
    _local_count_in_backward,
]  # fmt: skip


def _step(mutate: Callable[[], None] | None) -> dict[str, float]:
    if mutate is not None:
        _whole._among = lambda backend, x: None  # step by step, so that there is something to take away
        mutate()
    layer, oracle = syncnorm.SyncBatchNorm2d(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
    return step_errors(layer, oracle, (7, 3, 2, 3), [5, 2])


def test_the_layer_itself_passes() -> None:
    assert max(max(per_rank.values()) for per_rank in run_ranks(_step, 2, None)) <= 1e-12


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__.strip("_"))
def test_mutants_die(mutate: Callable[[], None]) -> None:
    for per_rank in run_ranks(_step, 2, mutate):
        assert max(per_rank.values()) > 1e-3, per_rank
