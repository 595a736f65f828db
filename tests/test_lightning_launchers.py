"""Tier: gloo ranks. SyncNorm under each way in which Lightning starts its processes: popen, spawn, fork, torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_training import TOLERANCE, by_hand, distance, lost

pytestmark = pytest.mark.gloo

SCRIPT = str(Path(__file__).with_name("lightning_launch.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LOCAL = ["BatchNorm2d", "BatchNorm1d"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, Any] = {}

    def run(strategy: str, launcher: tuple[str, ...] = (), *more: str) -> dict[str, Any]:
        key = " ".join((strategy, *more))
        if key not in done:
            out = tmp_path_factory.mktemp("launch") / "result.pt"
            command = [sys.executable, *launcher, SCRIPT, strategy, str(out), *more]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            process = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=280 if more else 110,
                check=False,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
            assert process.returncode == 0, process.stderr[-4000:]
            done[key] = torch.load(out, weights_only=True) | {"stderr": process.stderr}
        return done[key]

    return run


@pytest.mark.parametrize(
    ("strategy", "launcher"),
    [("ddp", ()), ("ddp_spawn", ()), ("ddp_fork", ()), ("ddp_find_unused_parameters_true", tuple(TORCHRUN))],
    ids=["popen", "spawn", "fork", "torchrun"],
)
def test_two_ranks_equal_one_process(launch: Any, strategy: str, launcher: tuple[str, ...]) -> None:
    run = launch(strategy, launcher)
    assert run["after"] == LOCAL
    assert distance(run["state"], by_hand()) < TOLERANCE
    said = "SyncNorm: 1 BatchNorm2d -> SyncBatchNorm2d, 1 BatchNorm1d -> SyncBatchNorm1d (2 ranks, gloo); 0 skipped"
    assert run["stderr"].count(said) == 1  # by rank zero alone


def test_without_it_the_same_comparison_fails(launch: Any) -> None:
    assert distance(launch("ddp_fork")["without"], by_hand()) > 1e-3


def test_another_architecture_is_refused_in_worker_processes(launch: Any) -> None:
    run = launch("ddp_fork")
    assert (
        "SyncNorm(to='group_norm') changes the architecture and cannot be carried back from strategy='ddp_fork'. Call "
        "syncnorm.convert(model, to='group_norm') before Trainer.fit." in run["refused"]
    )
    assert run["refused_after"] == LOCAL


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", [pytest.param("ddp_spawn", marks=pytest.mark.slow), "ddp_fork"])
def test_compiled_and_in_half_precision(launch: Any, strategy: str) -> None:
    run = launch(strategy, (), "more")
    assert distance(run["compiled"], by_hand()) < TOLERANCE
    halves = [name for name in run if name in ("bf16-mixed", "bf16-true")]
    assert len(halves) == (1 if strategy == "ddp_spawn" else 2)
    for precision in halves:
        assert lost(run[precision], precision) < 2
        assert strategy == "ddp_spawn" or lost(run[f"{precision}, without"], precision) > 20
