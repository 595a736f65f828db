"""Tier: gloo ranks. scripts/fault_trials.py sorts what it sees rightly: its table is only as honest as this."""

import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # ranks find it there, too
    import fault_trials

    yield fault_trials
    del sys.modules["fault_trials"], sys.modules["fault_trials_rank"]


def spec(trials: Any, fault: str) -> Any:
    return trials.Spec(fault, "norm2", 1, 1, 2, 5, 3.0)


def completed(error: float) -> dict[str, Any]:
    return {"kind": "completed", "text": "", "named": False, "error": error}


RAISED = {"kind": "RuntimeError", "text": "", "named": False}
NAMED = RAISED | {"named": True}


@pytest.mark.parametrize(("fault", "told", "died", "expected"), [
    ("skip", {0: NAMED, 1: NAMED}, {}, "named on all live ranks"),
    ("skip", {0: NAMED, 1: RAISED}, {}, "named on some"),
    ("skip", {0: RAISED, 1: RAISED}, {}, "unnamed error"),
    ("skip", {0: RAISED}, {1: "killed (exit code -6)"}, "abort of a healthy rank"),
    ("skip", {0: NAMED}, {1: "killed (exit code -11)"}, "abort of a healthy rank"),
    ("skip", {0: NAMED}, {1: "killed (exit code -9)"}, "hang"),
    ("skip", {0: completed(1.0), 1: completed(0.0)}, {}, "silently wrong"),
    ("dtype", {0: completed(1e-6), 1: completed(0.0)}, {}, "completed, and right"),
    ("kill", {0: NAMED}, {}, "named on all live ranks"),
    ("nan", {0: completed(float("nan")), 1: completed(0.0)}, {}, "completed"),
    ("none", {0: completed(float("nan")), 1: completed(0.0)}, {}, "silently wrong"),
])  # fmt: skip
def test_classes(trials: Any, fault: str, told: Any, died: Any, expected: str) -> None:
    live = [0] if fault == "kill" else [0, 1]
    assert trials.classify(spec(trials, fault), live, told, died) == expected


def test_what_passes(trials: Any) -> None:
    def summary(faults: list[str], benign: str = "completed, and right") -> dict[str, Any]:
        found = [{"fault": "skip", "class": of, "seconds": 0.1} for of in faults]
        return trials.summarise([*found, {"fault": "none", "class": benign, "seconds": None}])

    good = ["named on all live ranks"] * 98
    assert trials.passes(summary([*good, "named on some", "unnamed error"]))
    assert not trials.passes(summary([*good, *["named on some"] * 3]))
    for bad in ("abort of a healthy rank", "silently wrong", "hang"):
        assert not trials.passes(summary([*good, bad]))
    assert not trials.passes(summary(good, "named on all live ranks"))  # a false alarm


@pytest.mark.gloo
@pytest.mark.parametrize(("contender", "fault", "expected"), [
    ("watch", "skip", "named on all live ranks"), ("watch", "kill", "named on all live ranks"),
    ("watch", "nan", "completed"), ("textbook", "none", "completed, and right"), ("textbook", "swap", "silently wrong"),
])  # fmt: skip
def test_trials(trials: Any, contender: str, fault: str, expected: str) -> None:
    assert trials.trial(spec(trials, fault), contender)["class"] == expected
