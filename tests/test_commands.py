"""Tier: gloo ranks. Commands from a shell: what they print, the status they end with, the files they leave.

What they compute has tests of its own; ``doctor`` and ``fit`` are run in test_doctor.py and test_cli.py.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncnorm.cli import main
from syncnorm.cli._demo import _shortfalls

ROOT = Path(__file__).resolve().parent.parent
CSV = "method,batch,error\n" + "".join(f"{m},{b},{b + s}\n" for m in "ab" for b in (1, 8, 32) for s in range(3))


# Python with Lightning takes 4 seconds to start: one does, and each command is a fork of it, with a process, a folder, files
# for its output and an exit status of its own.
SHELL = """
import json, os, runpy, sys, traceback
import syncnorm.lightning

def run(folder, arguments):
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder + "." + name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, status = ["syncnorm", *arguments], 0
    try:
        runpy.run_module("syncnorm", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for folder, arguments in json.load(sys.stdin):
    child = os.fork() or run(folder, arguments)
    with open(folder + ".status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
LIGHTNING = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
COMMANDS: dict[str, list[str]] = {
    "advise": ["advise", "tests.doctor_models:fed", "--ranks", "8", "--json"],
    "verify": ["verify", "tests.doctor_models:left"],
    "convert-ckpt": ["convert-ckpt", "bn.pt", "gn.pt", "--to", "group_norm"],
    "bench": ["bench", "--shape", "4,3,5", "--rounds", "2", "--ranks", "2"],
    "build": ["build"],
    "validate": ["validate", *LIGHTNING, "--trainer.limit_val_batches=1"],
    "test": ["test", *LIGHTNING, "--trainer.limit_test_batches=1"],
    "predict": ["predict", *LIGHTNING, "--trainer.limit_predict_batches=1"],
    "plot": ["plot", "error.csv", "--x", "batch", "--y", "error", "--out", "error.svg"],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "dumb"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a folder for each of ``COMMANDS``, in which it ran."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="plot draws with it")
    root = tmp_path_factory.mktemp("commands")
    for name in COMMANDS:
        (root / name).mkdir()
    torch.save(nn.Sequential(nn.BatchNorm1d(4)).state_dict(), root / "convert-ckpt/bn.pt")
    (root / "plot/error.csv").write_text(CSV)
    jobs = json.dumps([(str(root / name), arguments) for name, arguments in COMMANDS.items()])
    command = [sys.executable, "-c", SHELL]
    subprocess.run(command, input=jobs, text=True, timeout=110, check=True, env=ENVIRONMENT)
    return root


def ran(folder: Path, name: str) -> tuple[int, str, str]:
    status, out, err = ((folder / f"{name}.{what}").read_text() for what in ("status", "out", "err"))
    return int(status), out, err


def shell(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "syncnorm", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env=ENVIRONMENT, cwd=folder
    )
    return done.returncode, done.stdout, done.stderr


def test_inspect(tmp_path: Path) -> None:
    assert shell(tmp_path, "inspect", "tests.doctor_models:plain") == (
        0,
        "1 × BatchNorm1d\nlayer  class        features  affine        statistics  group  notes\n"
        "1      BatchNorm1d  4         weight, bias  float32     local\n",
        "",
    )


def test_advise(folder: Path) -> None:
    status, out, err = ran(folder, "advise")
    assert (status, err) == (1, "")
    report = json.loads(out)
    assert report["ok"] is False and report["num_batches"] == 32 and report["ranks"] == 8
    (row,) = report["rows"]
    assert row["name"] == "1" and row["samples"] == 2 and row["action"] == "synchronise (world)"
    assert report["commands"] == ["syncnorm.convert(model, to='sync_batch_norm', process_group='world')"]


@pytest.mark.gloo
def test_verify(folder: Path) -> None:
    status, out, err = ran(folder, "verify")
    assert (status, err) == (1, "")
    assert "DO NOT EQUAL one process of 5" in out and "first layer that differs: 1," in out


def test_convert_ckpt(folder: Path) -> None:
    status, out, err = ran(folder, "convert-ckpt")
    assert (status, err) == (0, "")
    assert out.startswith("gn.pt: 1 norms as group_norm, 1 with other entries\n")
    assert [*torch.load(folder / "convert-ckpt/gn.pt", weights_only=True)] == ["0.weight", "0.bias"]


@pytest.mark.gloo
def test_bench(folder: Path) -> None:
    status, out, err = ran(folder, "bench")
    assert status == 0, err
    assert "of [4, 3, 5], float32, 1 thread, medians of 2 rounds" in out
    alone, _, together = out.partition("on each of 2 processes of this machine")
    assert all(name in alone for name in ("torch's batch norm", "aten", "reference", "GroupNorm"))
    assert "torch's batch norm" in together and "SyncBatchNorm  " in together and "gloo" in together


def test_build(folder: Path) -> None:
    status, out, err = ran(folder, "build")  # built already, or without a compiler
    assert not err and (status, out.startswith("FAILED: ")) in ((0, False), (1, True))


@pytest.mark.parametrize(("command", "said"), [("validate", "val/acc"), ("test", "test/acc"), ("predict", "")])
def test_lightnings(command: str, said: str, folder: Path) -> None:
    status, out, err = ran(folder, command)
    assert status == 0, err
    assert said in out


def test_plot(folder: Path) -> None:
    assert ran(folder, "plot") == (0, "error.svg: error over batch\n", "")
    assert (folder / "plot/error.svg").read_text().startswith("<?xml")


@pytest.mark.gloo
@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="the figure is drawn by it")
    status, out, err = shell(tmp_path, "demo", "--small", "--epochs", "1")
    assert status == 0, err
    assert "syncnorm   " in out and " 6 + 1\n" in out and "wrote outputs/demo.csv and outputs/demo.png" in out
    assert err.count("test error") == 3 and not out.count("seed 0")
    rows = list(csv.DictReader((tmp_path / "outputs/demo.csv").open()))
    assert [row["variant"] for row in rows] == ["local BN", "syncnorm", "GroupNorm"]
    assert 0 < float(rows[1]["test_error_percent"]) < float(rows[0]["test_error_percent"])
    drawn = (tmp_path / "outputs/demo.png").read_bytes()
    (tmp_path / "outputs/demo.png").unlink()
    assert main(["plot", str(tmp_path / "outputs/demo.csv")]) == 0
    assert (tmp_path / "outputs/demo.png").read_bytes() == drawn


# What plot draws, and what it refuses

BENCH = {
    "of": "x", "ranks": 2, "processes": [],
    "one_process": [{"layer": "SyncBatchNorm", "backend": "aten", "ratio": 1.0, "low": 0.9, "high": 1.1}],
}  # fmt: skip
STUDY = (ROOT / "docs/study/batch_mlp.csv").read_text()
TABLES = {"layer": {"of": "x", "rows": [{"shape": "(2, 3)", "native": "0.49 [0.47–0.50]", "aten": "–"}]}}


@pytest.mark.parametrize(
    ("name", "text", "arguments", "said"),
    [
        ("bench.json", json.dumps(BENCH), [], "bench.png: ratios of in one process: x"),
        ("cpu.json", json.dumps(TABLES), [], "cpu.png: ratios of layer"),
        (
            "study.csv",
            STUDY,
            ["--x", "batch", "--y", "error", "--by", "method"],
            "study.png: error over batch by method",
        ),
        ("study.csv", CSV, ["--x", "batch", "--y", "error", "--where", "method=a"], "study.png: error over batch"),
        (
            "level.csv",
            CSV + "c,,3\nd,1,\n",
            ["--x", "batch", "--y", "error", "--by", "method"],
            "level.png: error over batch by method",
        ),
        ("metrics.csv", "epoch,step,loss,acc\n0,1,2.5,\n0,2,1.5,0.4\n", [], "metrics.png: loss, acc over step"),
        ("excel.csv", "\ufeffstep,loss\n1,2.5\n2,1.5\n", [], "excel.png: loss over step"),
    ],
)
def test_plot_knows_what_there_is(
    name: str, text: str, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    assert main(["plot", name, *arguments]) == 0
    assert capsys.readouterr().out == f"{said}\n"
    assert Path(name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "text", "arguments", "said"),
    [
        ("no.csv", None, [], "No such file or directory: 'no.csv'"),
        ("a.csv", "", [], "a.csv has no rows: a CSV with a header and at least one row is needed."),
        ("a.csv", CSV, [], "say which columns of a.csv to draw with --x and --y, and --by for lines; it has ['method', "),
        ("a.csv", CSV, ["--x", "batch", "--y", "loss"], "--y must be a column of a.csv, got 'loss'; it has ['method',"),
        ("a.csv", CSV, ["--x", "method", "--y", "error"], "column 'method' of a.csv must hold numbers to be drawn, and has"),
        ("a.csv", CSV, ["--x", "batch", "--y", "error", "--out", "a.xyz"], "a.xyz must end in one of ['"),
        ("a.csv", CSV, ["--where", "lr=1"], "--where takes COLUMN=VALUE with a column of a.csv, got 'lr'; it has ['method',"),
        ("a.csv", CSV, ["--where", "method=c"], "no row of a.csv has method=c; there are ['a', 'b']."),
        ("a.csv", CSV, ["--out", "a.csv"], "a.csv is there already: choose another name, or say --force."),
        ("a.csv", CSV, ["--out", "no/a.png"], "there is no folder no: make it first."),
        ("a.json", "{", [], "a.json is no JSON: "),
        ("a.json", "[]", [], "a.json is of no benchmark: what bench --json or scripts/bench.py --out wrote is needed."),
        *(("a.json", text, [], "a.json is of no benchmark") for text in ('{"one_process": 3}', '{"one_process": [{"x": 1}]}')),
        ("a.csv", "\xff", [], "a.csv has no rows"),
    ],
)  # fmt: skip
def test_plot_refuses_in_one_line(
    name: str,
    text: str | None,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["plot", name, *arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and said in captured.err and captured.err.count("\n") == 1, captured.err
    assert os.listdir() == ([name] if text is not None else [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["demo", "--ranks", "1"],
            "--ranks must be at least 2, got 1: a lone rank has nobody to share statistics with.",
        ),
        (["demo", "--batch-per-rank", "1"], "--batch-per-rank must be at least 2, got 1: local BN needs two values."),
        (["demo", "--ranks", "600"], "ranks × batch-per-rank must be at most 1000, got 1200."),
        (["bench", "--shape", "4"], "--shape must be 2 to 5 sizes from 1 with a batch of at least 2, got [4]."),
        (["bench", "--rounds", "1"], "--rounds must be at least 2, got 1: one says nothing of the spread."),
    ],
)
def test_what_cannot_be_demonstrated_or_timed(arguments: list[str], said: str, capsys: Any) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"syncnorm {arguments[0]}: {said}\n"


@pytest.mark.parametrize(
    ("local", "sync", "drift", "collectives", "epochs", "said"),
    [
        (38.9, 2.8, 0.0, 6, 8, []),
        (38.9, 2.8, 0.1, 6, 8, ["syncnorm's running means must be the same on all ranks; they drift by 0.1 σ."]),
        (38.9, 2.8, 0.0, 5, 8, ["syncnorm's norm layers must enter 6 collectives per step, got 5."]),
        (12.0, 5.0, 0.0, 6, 8, ["local BN must collapse (test error above 20 %); got 12.00 %.", "below 5.0 % on 2 ranks"]),
        (12.0, 7.0, 0.0, 6, 2, ["local BN's error must be at least twice syncnorm's; got 12.00 % and 7.00 %."]),
    ],
)  # fmt: skip
def test_the_demo_notices_another_picture(
    local: float, sync: float, drift: float, collectives: int, epochs: int, said: list[str]
) -> None:
    def one(error: float, drift: float | None, collectives: int) -> list[dict[str, Any]]:
        return [{"errors": [90.0, error], "drifts": [0.0, drift], "norm_collectives": collectives}]

    runs = {"local BN": one(local, 0.4, 0), "syncnorm": one(sync, drift, collectives), "GroupNorm": one(3.0, None, 0)}
    found = _shortfalls(runs, 2, 2, epochs)
    assert len(found) == len(said) and all(part in whole for part, whole in zip(said, found, strict=True))
