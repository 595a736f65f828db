"""As much of pytest as the tests that need a device use, for machines where pytest is not installed.

python scripts/gpu_parts/tiny_pytest.py FILES: fixtures, parametrize, skip, raises, monkeypatch; one line for each outcome.
"""

import contextlib
import importlib
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class SkipError(Exception):
    """A test does not apply here."""


class Mark:
    """``pytest.mark``: a decorator of any name that notes its arguments."""

    def __init__(self, name: str = "", args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}

    def __getattr__(self, name: str) -> "Mark":
        return Mark(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and inspect.isfunction(args[0]):
            args[0].__dict__.setdefault("marks", []).append(self)
            return args[0]
        return Mark(self.name, args, kwargs)


class MonkeyPatch:
    def __init__(self) -> None:
        self.undo: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self.undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)


def fixture(function: Callable[..., Any] | None = None, *, autouse: bool = False) -> Any:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__dict__["fixture"] = "autouse" if autouse else "named"
        return function

    return mark if function is None else mark(function)


@contextlib.contextmanager
def raises(kind: Any, match: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        if not re.search(match, str(error)):
            raise AssertionError(f"{error!s} does not match {match}") from error
    else:
        raise AssertionError(f"did not raise {kind}")


def skip(reason: str = "") -> None:
    raise SkipError(reason)


def importorskip(name: str, reason: str = "") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SkipError(reason) from None


def run(path: str) -> tuple[int, int]:
    """Run a file's tests; passed and failed."""
    try:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    except SkipError:
        print(f"{path}::all SKIPPED", flush=True)
        return 0, 0
    except Exception:
        traceback.print_exc(file=sys.stdout)
        print(f"{path}::all FAILED", flush=True)
        return 0, 1
    fixtures = {n: f for n, f in vars(module).items() if getattr(f, "fixture", None)}
    own = getattr(module, "pytestmark", [])
    shared = own if isinstance(own, list) else [own]
    passed = failed = 0
    for name, test in list(vars(module).items()):
        if not name.startswith("test_") or not callable(test):
            continue
        marks = [*shared, *getattr(test, "marks", [])]
        cases = [m for m in marks if m.name == "parametrize"]
        for values in itertools.product(*([*m.args[1]] for m in cases)):
            arguments: dict[str, Any] = {}
            for mark, value in zip(cases, values, strict=True):
                names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
                arguments |= dict(zip(names, (value,) if len(names) == 1 else value, strict=True))
            label = f"{path}::{name}[{'-'.join(map(str, values))}]" if values else f"{path}::{name}"
            outcome = _outcome(test, arguments, marks, fixtures)
            passed, failed = passed + (outcome == "PASSED"), failed + (outcome == "FAILED")
            print(label, outcome, flush=True)
    return passed, failed


def _outcome(test: Callable[..., Any], arguments: dict[str, Any], marks: list[Mark], fixtures: dict[str, Any]) -> str:
    patch, finishing = MonkeyPatch(), []
    try:
        if any(m.name == "skipif" and m.args[0] for m in marks):
            raise SkipError
        wanted = [n for m in marks if m.name == "usefixtures" for n in m.args]
        for name, function in fixtures.items():
            if function.fixture == "autouse" or name in wanted:
                made = function(
                    **{"monkeypatch": patch} if "monkeypatch" in inspect.signature(function).parameters else {}
                )
                if inspect.isgenerator(made):
                    next(made)
                    finishing.append(made)
        if "monkeypatch" in inspect.signature(test).parameters:
            arguments["monkeypatch"] = patch
        test(**arguments)
        for made in finishing:
            next(made, None)
        return "PASSED"
    except SkipError:
        return "SKIPPED"
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return "FAILED"
    finally:
        for target, name, value in reversed(patch.undo):
            setattr(target, name, value)


def stand_in_for_pytest() -> None:
    """What ``import pytest`` finds from now on."""
    stand_in = ModuleType("pytest")
    vars(stand_in).update(
        mark=Mark(), fixture=fixture, raises=raises, skip=skip, importorskip=importorskip, MonkeyPatch=MonkeyPatch,
        Item=SimpleNamespace,
    )  # fmt: skip
    sys.modules["pytest"] = stand_in


def main(files: list[str]) -> int:
    """1 if a test failed."""
    failed = 0
    for file in files:
        paths = sorted(Path(file).glob("test_*.py")) if Path(file).is_dir() else [Path(file)]
        failed += sum(run(str(path))[1] for path in paths)
    return int(failed > 0)


if __name__ in ("__main__", "__mp_main__"):  # the second: ranks that a test starts
    stand_in_for_pytest()
if __name__ == "__main__":
    raise SystemExit(main([f for f in sys.argv[1:] if not f.startswith("-")]))
