"""Tier: gloo ranks. SyncNorm(watch=...) under a Trainer: a rank that is killed is named on the other one."""

import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import syncnorm
from syncnorm import SyncNorm
from syncnorm.distributed.watch import is_watching, patience
from syncnorm.testing import run_ranks
from tests.lightning_training import Training, fit


class Victim(Training):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 3 and dist.get_rank() == 1:
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def _killed() -> list[Any]:
    try:
        fit(Victim(), SyncNorm(watch=20.0))
    except syncnorm.SyncNormPeerLost as error:
        return [str(error), is_watching()]
    return ["completed", is_watching()]


@pytest.mark.gloo
def test_a_killed_rank_is_named() -> None:
    text, still_watching = run_ranks(_killed, 2, timeout=100, lost=[1])[0]
    assert "ranks [1] are gone: their processes have ended" in text
    assert "in 'net.1' call 4 forward C=6 float64" in text and not still_watching


def _around_a_fit(before: float | None) -> float | None:
    syncnorm.set_watch(before)
    callback = SyncNorm(watch=20.0)
    for _ in range(2):
        fit(Training(), callback, max_steps=1)
    return patience()


@pytest.mark.gloo
@pytest.mark.parametrize("before", [None, 40.0])
def test_a_fit_leaves_the_watch_as_it_was(before: float | None) -> None:
    assert run_ranks(_around_a_fit, 2, before, timeout=100) == [before] * 2


def test_a_time_must_be_positive() -> None:
    with pytest.raises(ValueError, match="watch must be True, False or a number of seconds, got -1"):
        SyncNorm(watch=-1)
