"""Tier: no process; four tests start ranks. doctor finds what is wrong, and nothing in what is sound; its command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import syncnorm
from syncnorm import cli
from syncnorm.cli import _console
from syncnorm.cli._console import show
from syncnorm.diagnostics import _doctor, _selftest
from syncnorm.diagnostics._findings import Subject, find
from syncnorm.distributed import GroupSpec
from tests.doctor_models import Checkpointed, Own, broken, plain, synced

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("inspect", "verify", "advise", "doctor")  # commands that take one


def codes(model: nn.Module, **subject: Any) -> dict[str, tuple[str, ...]]:
    return {finding.code: finding.layers for finding in find(Subject(model, **subject))}


def with_state(name: str, value: float) -> nn.Module:
    model = syncnorm.convert(plain())
    getattr(model[1], name).data[2] = value
    return model


def evaluating() -> nn.Module:
    model = syncnorm.convert(plain())
    model[1].eval()
    return model


def flagged() -> nn.Module:
    model = nn.Sequential(plain(), nn.Linear(4, 4))
    model[0].gradient_checkpointing = True
    return model


def in_group(spec: Any) -> nn.Module:
    model = syncnorm.convert(plain())
    model[1].process_group = spec
    return model


@pytest.mark.parametrize(
    ("make", "subject", "expected"),
    [
        (plain, {}, {"not-synchronised": ("1",)}),
        (lambda: synced()[0], {}, {}),
        (lambda: synced()[0], {"ranks": 4, "input": torch.randn(1, 3)}, {}),
        (lambda: nn.Sequential(nn.LayerNorm(3)), {}, {}),
        (lambda: nn.Sequential(Own(4)), {}, {"left-by-convert": ("0",)}),
        (lambda: nn.Sequential(nn.SyncBatchNorm(4)), {}, {"torch-sync-batch-norm": ("0",)}),
        (
            lambda: nn.Sequential(syncnorm.SyncBatchNorm1d(4), nn.SyncBatchNorm(4)),
            {},
            {"torch-sync-batch-norm": ("1",), "two-kinds": ("1",)},
        ),
        (lambda: with_state("running_var", -1.0), {}, {"broken-state": ("1",)}),
        (lambda: with_state("running_mean", torch.nan), {}, {"broken-state": ("1",)}),
        (lambda: with_state("weight", torch.inf), {}, {"broken-state": ("1",)}),
        (lambda: plain().half(), {}, {"not-synchronised": ("1",), "half-statistics": ("1",)}),
        (lambda: syncnorm.convert(plain().half()), {}, {}),
        (evaluating, {}, {"evaluating": ("1",)}),
        (lambda: evaluating().eval(), {}, {}),
        (lambda: syncnorm.revert(evaluating()), {}, {"evaluating": ("1",)}),  # a frozen one needs nobody
        (lambda: syncnorm.convert(evaluating(), to="frozen_batch_norm"), {}, {}),
        (Checkpointed, {}, {"not-synchronised": ("norm",), "checkpointed": ("norm",)}),
        (flagged, {}, {"not-synchronised": ("0.1",), "checkpointed": ("0.1",)}),
        (lambda: syncnorm.convert(Checkpointed()), {}, {}),
        (lambda: in_group(1), {}, {"group-size": ("1",)}),
        (lambda: in_group(2), {"ranks": 4}, {}),
        (lambda: in_group(2), {"ranks": 3}, {"group-size": ("1",)}),
        (lambda: in_group(GroupSpec("named", name="7", ranks=(0, 1))), {"ranks": 3}, {"outside-group": ("1",)}),
        (lambda: in_group(GroupSpec("named", name="7", ranks=(0, 1))), {"ranks": 2}, {}),
        (lambda: in_group(GroupSpec("outside")), {}, {"outside-group": ("1",)}),
        (plain, {"input": torch.randn(1, 3)}, {"not-synchronised": ("1",), "batch-of-one": ("1",)}),
        (plain, {"input": torch.randn(1, 3), "ranks": 4}, {"not-synchronised": ("1",), "batch-of-one": ("1",)}),
        (lambda: synced()[0], {"input": torch.randn(1, 3)}, {"batch-of-one": ("1",)}),
        (lambda: nn.Sequential(syncnorm.GhostBatchNorm1d(4, 1)), {}, {"batch-of-one": ("0",)}),
    ],
)
def test_what_is_wrong_is_found_and_nothing_else(
    make: Callable[[], nn.Module], subject: dict[str, Any], expected: dict[str, tuple[str, ...]]
) -> None:
    model = make()
    modes = [module.training for module in model.modules()]
    assert codes(model, **subject) == expected
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_findings_say_what_and_what_to_do() -> None:
    (finding,) = find(Subject(with_state("running_var", -1.0)))
    assert str(finding) == (
        "broken-state: running_var is negative in channel [2] of 4 (-1) [1]. Load a sound checkpoint "
        "(syncnorm.validate_state_dict looks at one), or reset the layer."
    )
    many = find(Subject(nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(9)]), input=torch.randn(1, 2)))
    assert [f.code for f in many] == ["not-synchronised", "batch-of-one"]
    assert "[0, 1, 2, 3, 4, … 4 more]" in str(many[1])
    with pytest.raises(ValueError, match="the model fails on its input: RuntimeError: mat1 and mat2 shapes"):
        find(Subject(plain(), input=torch.randn(2, 7)))


def trainer(**options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=2, strategy="ddp", **{**quiet, **options})


def test_a_trainer_beside_the_model() -> None:
    ours = {"callbacks": [syncnorm.SyncNorm()]}
    assert codes(plain(), trainer=trainer(**ours)) == {}
    assert codes(plain(), trainer=trainer()) == {"not-synchronised": ("1",)}
    assert codes(plain(), trainer=trainer(plugins=[syncnorm.SyncNormPlugin()])) == {}
    both = trainer(sync_batchnorm=True, **ours)
    assert codes(plain(), trainer=both) == {"sync-batchnorm-flag": ()}
    assert codes(syncnorm.convert(plain()), trainer=trainer(sync_batchnorm=True)) == {"sync-batchnorm-flag": ()}


def test_ddp_that_overwrites_the_statistics_of_groups(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for group, broadcast, found in (
            (2, True, {"broadcast-buffers": ("module.1",)}),
            (2, False, {}),
            ("world", True, {}),
        ):
            wrapped = nn.parallel.DistributedDataParallel(in_group(group), broadcast_buffers=broadcast)
            assert codes(wrapped) == found
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"torch": "2.13.0+cpu", "lightning": "2.6.6"}, []),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, ["torchvision"]),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, []),
        ({"torch": "2.5.1", "lightning": "2.4.0"}, ["old-torch", "old-lightning"]),
        ({"torch": "2.10.0a0", "pytorch-lightning": "2.10"}, []),
    ],
)
def test_known_bad_versions(versions: dict[str, str], found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "_version", lambda package: versions.get(package, ""))
    assert [finding.code for finding in _doctor._environment_findings()] == found


# The self-test


@pytest.mark.gloo
def test_the_trials_pass_and_quote_what_a_user_would_read() -> None:
    equality, mismatch, killed = _selftest.selftest()
    assert equality.ok and mismatch.ok and killed.ok, (equality, mismatch, killed)
    assert equality.detail.startswith("largest error ")
    assert "ranks [0] in '0' call 1 forward" in mismatch.detail and "ranks [1] in '1'" in mismatch.detail
    assert "ranks [1] are gone" in killed.detail


def test_a_trial_that_fails_says_so() -> None:
    mixed = _selftest._judge_mismatch(["", ""])
    assert mixed == (False, "not noticed: statistics of two layers were mixed")
    assert _selftest._judge_mismatch(["named", ""]) == (False, "named")
    unnamed = _selftest._judge_killed([("RuntimeError", "Connection closed by peer", 0.5), None])
    assert unnamed == (False, "noticed after 0.5 s, and not named: RuntimeError: Connection closed by peer")
    assert _selftest._judge_equality([1e-15, 1e-3]) == (False, "largest error 1.0e-03, at most 1e-12")


@pytest.mark.gloo
def test_a_rank_that_raises_fails_its_trial() -> None:
    trial = _selftest._try("name", 30.0, broken, lambda _: (True, ""))
    assert (trial.ok, trial.detail) == (False, "rank 0: in two lines; rank 1: in two lines")


# The command line


def run(*arguments: str) -> tuple[int, str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "syncnorm", *arguments],
        capture_output=True, text=True, timeout=110, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.gloo
def test_doctor_from_a_shell() -> None:
    status, out, err = run("doctor", "tests.doctor_models:synced", "--ranks", "2", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["ok"] is True and report["findings"] == [] and report["not_checked"] == []
    assert [trial["ok"] for trial in report["trials"]] == [True] * 3
    assert torch.__version__.startswith(report["environment"]["torch"])  # which may lack a "+cu130"
    assert report["backends"]["batch norms on cpu"]["reference"] is None


@pytest.mark.gloo
def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "tests.doctor_models:synced"]) == 0
    assert "2 ranks of [3, 2] samples equal one process of 5" in capsys.readouterr().out
    assert cli.main(["verify", "tests.doctor_models:left", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["rows"][1]["name"] == "1" and report["rows"][1]["ok"] is False
    with pytest.raises(SystemExit):
        cli.main(["verify", "tests.doctor_models:synced", "--shape", "4,7"])
    assert "syncnorm verify: the model fails: RuntimeError: mat1 and mat2 shapes" in capsys.readouterr().err


def test_doctor_and_inspect_print_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "tests.doctor_models:plain", "--no-trial"]) == 1
    out = capsys.readouterr().out
    assert (
        "findings: 1\n  1. not-synchronised: 1 batch norms use the statistics of their own rank only [1]. Call" in out
    )
    assert "not checked: sizes of batches; let the factory return (model, input), or give --shape" in out
    assert "\033" not in out
    assert cli.main(["doctor", "tests.doctor_models:shared", "--no-trial", "--shape", "1,3", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["code"] for finding in found] == ["not-synchronised", "batch-of-one"]
    assert cli.main(["inspect", "tests.doctor_models:left", "--json"]) == 0
    assert [row["type"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["Own", "BatchNorm1d"]
    assert cli.main(["inspect", "tests.doctor_models:left", "--to", "group_norm", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["action"]) for entry in told["entries"]] == [("1", "skip"), ("2", "replace")]
    assert cli.main(["inspect", "tests.doctor_models:Checkpointed"]) == 0
    assert "1 × BatchNorm1d" in capsys.readouterr().out
    assert cli.main(["doctor", "--no-trial"]) == 0


def test_drawn_only_for_a_terminal_that_wants_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="draws")
    report = syncnorm.inspect(plain())
    trial = _doctor.DoctorReport(
        {}, {}, (_selftest.Trial("a", True, "b", 1), _selftest.Trial("c", False, "d", 1)), (), ()
    )
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def shown(made: Any) -> str:
        show(made, as_json=False)
        return capsys.readouterr().out

    assert shown(report) == f"{report}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[1m" in shown(report)
    assert "\033[32m  ok:\033[0m" in shown(trial) and shown(trial).count("\033[31m") == 1
    with monkeypatch.context() as patched:
        patched.setenv("NO_COLOR", "1")
        assert "\033[3" not in shown(trial)
        assert shown(trial) == f"{trial}\n"
    for change in (lambda p: p.setenv("TERM", "dumb"), lambda p: p.setattr(_console, "find_spec", lambda name: None)):
        with monkeypatch.context() as patched:
            change(patched)
            assert shown(report) == f"{report}\n" and shown(trial) == f"{trial}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctor", "nowhere"], "syncnorm doctor: expected pkg.mod:factory, got 'nowhere'. For example"),
        (["doctor", "no_such:x"], "syncnorm doctor: cannot import 'no_such': ModuleNotFoundError: No module named"),
        (["inspect", "tests.doctor_models:plian"], "tests.doctor_models has no 'plian'. Close names are ['plain']."),
        (["inspect", "tests.doctor_models:number"], "an nn.Module, or a tuple of one, an input and a Trainer; it made int"),
        (["doctor", "tests.doctor_models:broken"], "was called without arguments and raised RuntimeError: no weights."),
        (["doctor", "tests.doctor_models:leaving"], "was called without arguments and raised SystemExit: 3."),
        (["doctor", "--timeout", "nan"], "timeout must be a number of seconds above 0, got nan."),
        (["verify", "tests.doctor_models:array"], "input must hold a tensor with its samples in dim 0, got ndarray without"),
        (["doctor", "tests.doctor_models:plain", "--no-trial", "--shape", "4,5"], "the model fails on its input: RuntimeError"),
        (["verify", "tests.doctor_models:plain"], "verify needs an input: let the factory return (model, input)"),
        (["advise", "tests.doctor_models:plain"], "advise needs batches: let the factory return (model, loader), or give"),
        (["advise", "tests.doctor_models:starved"], "advise needs at least one batch with samples on some rank, got none."),
        (["advise", "tests.doctor_models:mapped"], "advise needs batches that can be iterated, such as a DataLoader"),
        (["verify", "tests.doctor_models:synced", "--to", "x"], "argument --to: invalid choice: 'x' (choose from"),
        (["doctor", "--shape", "4,x"], "must be sizes with commas between them, such as 8,3,224,224; got '4,x'"),
        (["doctor", "--ranks", "0"], "argument --ranks: must be a number from 1, got '0'"),
        (["doctor", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["inspect"], "required: pkg.mod:factory"),
        (["inspect", "tests.doctor_models:plain", "--to", "ghost_batch_norm"], "needs virtual_batch_size=n; see syncnorm"),
        *(([name, "tests.doctor_models:without"], "makes a Sequential without a normalisation layer") for name in MODELS),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1]
    assert not captured.out


@pytest.mark.gloo
def test_what_a_model_prints_stays_out_of_the_report() -> None:
    status, out, err = run("verify", "tests.doctor_models:talking", "--json")
    assert status == 0 and json.loads(out)["ok"] is True
    assert err.count("in its factory") == 1 and err.count("in its forward") >= 3, "here and on the ranks"


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("inspect tests.doctor_models:plain | true; echo ${PIPESTATUS[0]}", "141", ""),
        ("inspect tests.doctor_models:plain > /dev/full; echo $?", "2", "syncnorm inspect: [Errno 28] No space left"),
        ("inspect tests.doctor_models:plain >&-; echo $? >&2", "", "0\n"),
    ],
    ids=["head", "full", "closed"],
)
def test_a_reader_that_has_gone(command: str, status: str, said: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("Linux has /dev/full")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m syncnorm {command}"],
        capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == status
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_doctor_does_not_need_lightning() -> None:
    code = (
        "import sys; from syncnorm.cli import main\n"
        "assert main(['doctor', '--no-trial']) == 0\n"
        "assert 'lightning' not in sys.modules and 'jsonargparse' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
