"""Tier: no process. Files are data: configurations are bounded, checkpoints are never pickles, no collective unpickles."""

import ast
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from syncnorm.cli import main
from syncnorm.lightning._config import load_config

ROOT = Path(__file__).resolve().parent.parent
OURS = [path for folder in ("syncnorm", "scripts", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)

# Our code, read


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(n.func), n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_loaded_as_code(path: Path) -> None:
    own_child = {"syncnorm/testing/ranks.py", "syncnorm/diagnostics/_measure.py"}  # files that we wrote a moment ago
    for name, call in calls(path):
        last = name.rpartition(".")[2]
        if name == "torch.load" or last == "load_state_dict_from_url":
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
        if name.startswith(("pickle.load", "marshal.", "dill.", "joblib.", "shelve.", "jsonpickle.")):
            assert path.relative_to(ROOT).as_posix() in own_child, f"{path}:{call.lineno}"
        assert not last.endswith("_object") and last not in {"all_gather_object", "broadcast_object_list"}, path
        assert name not in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}, f"{path}:{call.lineno}"
        assert last not in {"add_safe_globals", "load_from_checkpoint"}, f"{path}:{call.lineno}"


def test_the_reader_above_would_see_it(tmp_path: Path) -> None:
    for line in ("torch.load(f)", "torch.load(f, weights_only=flag)", "dist.all_gather_object(a, b)", "eval(name)"):
        (tmp_path / "x.py").write_text(f"import torch\n{line}\n")
        with pytest.raises((AssertionError, ValueError)):
            test_nothing_is_loaded_as_code(tmp_path / "x.py")


# Configurations


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("eps: 1e-5", {"eps": 1e-5}),  # PyYAML alone: the string "1e-5"
        ("a: {b: [1, 2.5, true, null, x]}", {"a": {"b": [1, 2.5, True, None, "x"]}}),
        ('{"a": [1, {"b": "c"}]}', {"a": [1, {"b": "c"}]}),
        ("SyncNorm", "SyncNorm"),
        ("[head.*]", ["head.*"]),
        ("[" * 16 + "]" * 16, None),
    ],
)
def test_sound_configurations_load(text: str, value: Any) -> None:
    assert load_config(text) == value or value is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r"line 2: aliases \(\*a\) are not allowed. Write the values out"),
        ("<<: *x", "aliases"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice, first in line 1"),
        ("x: [{a: {b: 1, b: 2}}]", "line 1: the key 'b' is there twice"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 17 + "]" * 17, "line 1: nested more than 16 deep"),
        ("{a: " * 1000, "line 1: nested more than 16 deep"),
        ("[" * 30000, "line 1: nested more than 16 deep"),
        ("a: " + "x" * 65536, "64 KiB at most"),
        ("a: " + "é" * 33000, "64 KiB at most"),
        ('!!python/object/apply:os.system ["true"]', "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: [1", "expected ',' or ']'"),
    ],
    ids=range(13),
)
def test_other_configurations_are_an_error_in_one_line(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError, match=said):
        load_config(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases (*a) are not allowed"),
        ("trainer: {max_epochs: 1}\ntrainer: {max_epochs: 2}", "line 2: the key 'trainer' is there twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("trainer: {max_epochs: [", "Problems parsing config"),
        ("42", "Unexpected config: 42"),
        ("[]", "Unexpected config"),
        ("null", "Unexpected config"),
        ("", "Unexpected config"),
        ("traner: {max_epochs: 1}", "traner"),
    ],
    ids=range(9),
)
def test_the_command_line_refuses_them_and_ends_with_2(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["syncnorm"])
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", str(tmp_path / "c.yaml"), "--print_config"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1] or said in captured.err
    assert "Traceback" not in captured.err and not captured.out


# Checkpoints


class _Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path(_Code.target),))

    target = ""


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_with_code_in_it_is_not_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["syncnorm"])
    _Code.target = str(tmp_path / "ran")
    torch.save({"state_dict": {}, "hyper_parameters": {}, "callbacks": _Code()}, tmp_path / "bad.ckpt")
    arguments = ["--model=tests.lightning_training.Training", "--data=null", f"--ckpt_path={tmp_path / 'bad.ckpt'}"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    with pytest.raises(Exception, match="Weights only load failed"):
        main([command, *arguments, *quiet, "--trainer.enable_checkpointing=false"])
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit) as stopped:  # and there is no option to run it
        main([command, *arguments, "--weights_only=false"])
    assert stopped.value.code == 2
    assert "weights_only" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_trainer_is_told_too(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's default for a remote checkpoint is weights_only=False.
    monkeypatch.setattr(sys, "argv", ["syncnorm"])
    seen: dict[str, Any] = {}
    original = getattr(Trainer, command)
    monkeypatch.setattr(Trainer, command, functools.wraps(original)(lambda self, **given: seen.update(given)))
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    assert main([command, "--ckpt_path=https://host.invalid/x.ckpt", *quiet]) == 0
    assert seen["weights_only"] is True
    assert seen["ckpt_path"] == "https://host.invalid/x.ckpt"
