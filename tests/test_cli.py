"""Tier: no process; two tests start a training on two ranks. The command line and the configs that come with it."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

import syncnorm
from syncnorm.cli import main
from syncnorm.cli._main import make_parser
from syncnorm.conversion import To

ROOT = Path(__file__).resolve().parent.parent
DEMO = ["-c", str(ROOT / "configs/demo.yaml")]
COMMANDS = ("inspect", "verify", "advise", "doctor", "convert-ckpt", "bench", "demo", "plot", "build")
LIGHTNING = ("fit", "validate", "test", "predict")
NORMS = sorted((ROOT / "configs/norm").glob("*.yaml"))
SMALL = [
    *("--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"),
    *("--trainer.limit_test_batches=1", "--trainer.limit_predict_batches=1"),
]


def config(name: str) -> list[str]:
    return ["-c", str(ROOT / "configs" / name)]


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["syncnorm"])  # LightningCLI warns of arguments from two sides


def run(*arguments: str, timeout: float = 110, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "syncnorm", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=environment, cwd=cwd
    )


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["fitt"], ["-c", "demo.yaml", "fit"]])
def test_wrong_usage_ends_with_2_and_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    if arguments[:1] == ["fitt"]:
        assert "invalid choice: 'fitt'" in said
        assert all(command in said for command in ("fit", "validate", "test", "predict"))


def test_every_argument_of_every_command_has_help() -> None:
    """And every sentence of it comes from the docstring of the command."""
    (commands,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert {*commands.choices} == {*COMMANDS, *LIGHTNING}
    for name, parser in commands.choices.items():
        if name in LIGHTNING:
            continue  # jsonargparse's, and test_the_help_of_lightnings_commands
        assert parser.description and all(action.help for action in parser._actions), name
        assert "--json" in parser.format_help()
    assert {action.dest for action in commands._choices_actions} == {*commands.choices}


@pytest.mark.parametrize("command", LIGHTNING)
def test_the_help_of_lightnings_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--trainer.devices" in said and "--ckpt_path" in said and "--data" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {devices: [1\n", "expected ',' or ']', but got '<stream end>'"),
        ("trainer: {devises: 1}\n", "devises"),
        ("trainer: {devices: 1}\ntrainer: {devices: 2}\n", "the key 'trainer' is there twice"),
        (None, "File does not exist"),
    ],
)
def test_a_malformed_configuration_is_one_line(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", "bad.yaml"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("syncnorm fit: ") and captured.err.count("\n") == 1 and not captured.out
    assert said in captured.err and captured.err.endswith("(syncnorm fit --help tells more)\n")
    assert os.listdir() == (["bad.yaml"] if text else [])


def test_a_checkpoint_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--ckpt_path", "no.ckpt", "--trainer.accelerator=cpu", "--trainer.logger=false"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "syncnorm test: there is no checkpoint no.ckpt. (syncnorm test --help tells more)"


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (
            "{class_path: SyncNorm, init_args: {to: ghost_batch_norm}}",
            "to='ghost_batch_norm' needs virtual_batch_size=n",
        ),
        ("{class_path: SyncNorm, init_args: {watch: -1}}", "watch must be True, False or a number of seconds, got -1"),
        ("{class_path: NormMonitor, init_args: {every_n_steps: 0}}", "NormMonitor: every_n_steps must be"),
    ],
)
def test_what_a_callback_does_not_take_is_one_line(
    callback: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(f"trainer: {{accelerator: cpu, logger: false, callbacks: [{callback}]}}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", "bad.yaml"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"syncnorm fit: {said}") and line.endswith("(syncnorm fit --help tells more)")


def test_what_classes_of_others_raise_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_callback.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Own(Callback):\n"
        "    def __init__(self): raise ValueError('a defect of mine')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a defect of mine"):
        main(["fit", "--trainer.accelerator=cpu", "--trainer.callbacks+=own_callback.Own"])


def test_help_and_version_do_not_load_lightning() -> None:
    code = (
        "import sys; from syncnorm.cli import main\n"
        "for argument in ('--help', '--version'):\n"
        "    try: main([argument])\n"
        "    except SystemExit as stopped: assert stopped.code == 0, stopped\n"
        "assert 'lightning' not in sys.modules and 'jsonargparse' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for word in ("fit", "validate", "test", "predict", "configs/demo.yaml", f"syncnorm {syncnorm.__version__}"):
        assert word in done.stdout


@pytest.mark.parametrize("norm", NORMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("trainer", ["ddp_cpu", "ddp_gpu", "single"])
def test_every_combination_of_configs_round_trips(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, norm: Path, trainer: str
) -> None:
    first = parsed(capsys, "fit", *DEMO, *config(f"trainer/{trainer}.yaml"), "-c", str(norm))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(first))
    assert parsed(capsys, "fit", "-c", str(tmp_path / "all.yaml")) == first
    assert first["model"]["class_path"] == "syncnorm.lightning.DigitsMLP"
    assert [c["class_path"] for c in first["trainer"]["callbacks"]] == ["syncnorm.SyncNorm"] * (norm.stem != "local")


def test_defaults_are_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed(capsys, "fit")
    assert found["model"]["class_path"] == "syncnorm.lightning.DigitsMLP"
    assert found["data"]["class_path"] == "syncnorm.lightning.DigitsDataModule"


def test_short_names_and_the_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--trainer.callbacks+=SyncNorm",
        "--trainer.callbacks.exclude=[head.*]",
        "--trainer.plugins=SyncNormPlugin",
    ]
    trainer = parsed(capsys, "fit", *arguments)["trainer"]
    assert trainer["callbacks"][0]["init_args"]["exclude"] == ["head.*"]
    assert trainer["plugins"]["class_path"].endswith("SyncNormPlugin")


def test_a_wrong_target_lists_the_allowed_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "configs/norm/sync.yaml").read_text().replace("to: sync_batch_norm", "to: batch_norm"))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *DEMO, "-c", str(wrong)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{list(get_args(To))}. Got value: batch_norm" in said
    assert {"sync_batch_norm", "group_norm", "layer_norm", "instance_norm"} <= set(get_args(To))


def test_group_norm_is_saved_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)
    common = [*DEMO, *config("trainer/single.yaml"), *config("norm/group_norm.yaml"), *SMALL]
    common += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *common]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["syncnorm"]["specs"][0]["to"] == "group_norm"
    for command in ("validate", "test", "predict"):
        assert main([command, *common, f"--ckpt_path={checkpoint}"]) == 0


def test_a_model_with_loaders_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--model=tests.lightning_training.Training", "--data=null", "--trainer.callbacks+=SyncNorm"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false", *SMALL]
    assert main(["fit", *arguments]) == 0


@pytest.mark.gloo
def test_the_demo_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    configs = [*DEMO, *config("trainer/ddp_cpu.yaml"), *config("norm/sync.yaml")]
    done = run("fit", *configs, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SyncNorm: 3 BatchNorm1d -> SyncBatchNorm1d (2 ranks, gloo); 0 skipped" in done.stderr
    assert (tmp_path / "outputs/digits/version_0/metrics.csv").exists()
