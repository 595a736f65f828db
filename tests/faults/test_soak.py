"""Tier: gloo ranks. scripts/soak.py in seconds, and that it would see what it looks for."""

import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MIB = 2**20


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # ranks find it there, too
    import soak

    yield soak
    del sys.modules["soak"]


def looks(grow: float, files: list[int]) -> dict[str, Any]:
    """A look a second: 28 MiB in the first seven, then so many per look."""
    memory = [200 + 4 * min(k, 7) + grow * max(k - 7, 0) for k in range(20)]
    return {"seconds": 20.0, "seen": [(float(k), memory[k] * MIB, files[k]) for k in range(20)]}


@pytest.mark.parametrize(("grow", "files", "drift"), [
    (0.0, [19] * 20, {"memory_mib": 0.0, "files": 0}),
    (0.25, [19] * 20, {"memory_mib": 2.75, "files": 0}),
    (0.0, [9] * 5 + [19] * 14 + [20], {"memory_mib": 0.0, "files": 1}),
])  # fmt: skip
def test_growth_behind_the_warm_up_is_seen(soak: Any, grow: float, files: list[int], drift: dict[str, float]) -> None:
    assert soak.drift(looks(grow, files)) == drift


def test_growth_fails(soak: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for grow, verdict in ((0.1, "passed"), (0.25, "FAILED")):
        monkeypatch.setattr(soak, "run_ranks", lambda *_, grow=grow, **__: [looks(grow, [19] * 20) | {"steps": 9}])
        assert soak.main(["--cycles", "0"]) == int(verdict == "FAILED")
        said = capsys.readouterr().out
        assert said.endswith(f"{verdict}\n") and ("TOO MUCH" in said) == (verdict == "FAILED")


@pytest.mark.gloo
def test_some_seconds_of_it(soak: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes", "0.05", "--cycles", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("audits clean") == 2 and "open files +0" in said and said.endswith("passed\n")
    assert "2 runs with a killed rank: 0 processes and 0 sockets left" in said
