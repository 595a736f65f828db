"""Tier: gloo ranks. What a function may do within ``run_ranks``, and what becomes of its ranks when the caller stops."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from syncnorm.testing import RankError, run_ranks

pytestmark = pytest.mark.gloo


def _loads() -> float:
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2, num_workers=1)
    return sum(float(x.sum()) for (x,) in loader)


def test_a_rank_may_have_workers_of_its_own() -> None:
    assert run_ranks(_loads, 2) == [6.0, 6.0]


def _gives_a_function() -> object:
    return (lambda: 1) if dist.get_rank() else 1


def test_a_result_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_gives_a_function, 2)
    assert set(caught.value.errors) == {1}
    assert "what the function returned cannot be pickled" in caught.value.errors[1]


def test_nobody_is_no_group() -> None:
    with pytest.raises(ValueError, match="run_ranks starts at least 1 rank, got ranks=0"):
        run_ranks(_loads, 0)


def _sleeps(folder: str) -> None:
    (Path(folder) / f"{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(60)


def test_ranks_end_when_their_caller_is_interrupted(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        if sum(bool(file.read_text()) for file in tmp_path.iterdir()) < 2:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            run_ranks(_sleeps, 2, str(tmp_path), timeout=50)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
