"""Tier: no process. scripts/gpu_check.py where there is no GPU: a sentence, a report, and parts that run in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncnorm.kernels.triton import _interpreter_objection

ROOT = Path(__file__).resolve().parent.parent


def check(out: Path, *arguments: str) -> tuple[str, dict[str, dict[str, object]]]:
    command = [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--out", str(out), *arguments]
    said = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout + (out / "report.md").read_text(), json.loads((out / "report.json").read_text())["parts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    said, parts = check(tmp_path)
    assert "primitives: skipped, torch finds no CUDA device on this machine" in said
    assert {part["status"] for part in parts.values()} == {"skipped"} and len(parts) == 8


@pytest.mark.slow
@pytest.mark.skipif(bool(_interpreter_objection()), reason=str(_interpreter_objection()))
def test_a_dry_run_claims_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")
    said, parts = check(tmp_path, "--dry", "--parts", "models", "large", "pair", "tune")
    assert "A dry run on the CPU: the numbers mean nothing" in said
    assert [part["status"] for part in parts.values()] == ["complete"] * 4
    assert [row["provider"] for row in parts["models"]["rows"]][:2] == ["ours, fused", "ours, as a drop-in"]
    assert {row["provider"] for row in parts["pair"]["rows"]} == {"ours"}  # torch's knows no CPU
    assert {row["knob"] for row in parts["tune"]["rows"]} >= {"TILE_BYTES", "ROW_REGISTERS"}
    assert {row["outcome"] for row in parts["large"]["rows"]} == {"collected"}


def test_targets_stand_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_parts import targets

    def layer(provider: str, dtype: str, ratio: float, name: str = "BatchNorm") -> dict[str, object]:
        return {
            "layer": name,
            "shape": "s",
            "layout": "NCHW",
            "dtype": dtype,
            "provider": provider,
            "times ours": ratio,
        }

    def primitive(shape: str, of_copy: float) -> dict[str, object]:
        return {"primitive": "moments", "shape": shape, "of copy": of_copy}

    large, small = targets.LARGE[0], targets.SMALL[0]
    rows = {
        "primitives": [primitive(large, 0.95), primitive(large, 0.89), primitive(small, 0.71)],
        "layers": [
            layer("ours", "bfloat16", 1.0), layer("nn.BatchNorm2d", "bfloat16", 0.97), layer("nn.BatchNorm2d", "float32", 2.0),
            *(layer(peer, "bfloat16", ratio, "RMSNorm") for peer, ratio in (("F.rms_norm", 9.0), ("quack", 0.8))),
        ],
        "ranks": [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "skipped"}],
        "large": [{"test": "a", "outcome": "failed"}],
    }  # fmt: skip
    lines = list(targets.lines({name: {"rows": found} for name, found in rows.items()}))
    found = {cells[1]: cells[2:] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:])}
    both = " and ".join(targets.LARGE)
    assert found[f"moments at {both}, of a copy ≥ 0.9"][:2] == ["0.89", "**missed**"]
    assert found[f"moments at {small}, of a copy ≥ 0.7"][:2] == ["0.71", "met"]
    assert found["BatchNorm, of `nn.BatchNorm2d` ≤ 1.05"][:2] == ["1.03", "met"]
    assert found["RMSNorm, of the best peer ≤ 1.0"][:2] == ["1.25", "**missed**"]
    assert found["LayerNorm, of the best peer ≤ 1.0"][0] == "not measured"
    assert found["no test of `ranks` fails"][:2] == ["0 of 1", "met"]
    assert found["no test of `large` fails"][:2] == ["1 of 1", "**missed**"]


def test_a_test_part_without_pytest_runs_the_same_functions(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "test_gone.py").write_text("import there_is_no_such_module\n")
    (suite / "test_some.py").write_text(
        "import pytest\nfrom syncnorm.testing import run_ranks\n"
        "@pytest.fixture(autouse=True)\ndef _around():\n    print('before')\n    yield\n    print('after')\n"
        "@pytest.mark.parametrize(('a', 'b'), [(1, 2), (3, 4)])\n@pytest.mark.parametrize('c', [5])\n"
        "def test_sum(a, b, c):\n    assert a + b + c == 8\n"
        "def test_raises(monkeypatch):\n    with pytest.raises(ValueError, match='no'):\n        raise ValueError('no')\n"
        "def test_skip():\n    pytest.skip('not here')\n"
        "def _rank():\n    return hasattr(pytest, '__version__')\n"
        "def test_ranks_know_the_stand_in():\n    assert run_ranks(_rank, 1) == [False]\n"
    )
    command = [
        sys.executable,
        str(ROOT / "scripts/gpu_parts/tiny_pytest.py"),
        "suite/test_gone.py",
        "suite/test_some.py",
    ]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 1
    outcomes = [line.split(" ")[-1] for line in said.stdout.splitlines() if line.startswith("suite/")]
    assert outcomes == ["FAILED", "PASSED", "FAILED", "PASSED", "SKIPPED", "PASSED"], said.stdout
    assert said.stdout.count("before") == 5 and said.stdout.count("after") >= 3
