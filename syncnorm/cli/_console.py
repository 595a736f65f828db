"""What a command prints. Tables and colours where rich is installed and somebody looks, plain text everywhere else."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, TextIO

from syncnorm.conversion._table import Table

__all__ = ["progress", "reserved", "show", "working"]

_GOOD, _BAD = re.compile(r"^ *ok:"), re.compile(r"^ *FAILED:|^  \d+\. [\w-]+:|DO NOT EQUAL|^NOT AS EXPECTED")


def show(report: Any, *, as_json: bool) -> int:
    """Print a report to standard output.

    Args:
        report: A dataclass; of a :class:`Report` the parts, of another its text.
        as_json: Print its fields, and whether all is well.

    Returns:
        The exit status: 0 if all is well, 1 if not.
    """
    ok = bool(getattr(report, "ok", True))
    if as_json:
        fields = report.to_dict() if hasattr(report, "to_dict") else dataclasses.asdict(report)
        found = json.dumps({"ok": ok, **fields}, default=str)
        print(json.dumps(json.loads(found, parse_constant=str), indent=2), flush=True)  # JSON has no Infinity
    elif _drawn(sys.stdout):
        _draw(report.parts() if hasattr(report, "parts") else [str(report)])
    else:
        print(report, flush=True)
    return 0 if ok else 1


@contextmanager
def reserved() -> Iterator[None]:
    """Within, what a model or its factory prints goes to standard error, also in other processes: the report stands alone."""
    with ExitStack() as stack:
        if sys.__stdout__ is not None:  # else descriptor 1 is closed, or some file's
            sys.__stdout__.flush()
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on a terminal that something is being done that takes some seconds."""
    if not _is_terminal(sys.stderr):
        yield
    elif _drawn(sys.stderr):
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Count steps on a terminal.

    Args:
        what: Is done.
        total: Number of steps.

    Yields:
        A function to call after each step, with a word on how it stands.
    """
    if not _is_terminal(sys.stderr):
        yield lambda text: None
    elif _drawn(sys.stderr):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
        with Progress(TextColumn(what), *columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, state="")
            yield lambda text: bar.update(task, advance=1, state=text)
    else:
        done = 0

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            print(f"\r{what} {done}/{total} {text}\033[K", end="", file=sys.stderr, flush=True)

        yield advance
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _drawn(stream: TextIO | None) -> bool:
    return _is_terminal(stream) and os.environ.get("TERM") != "dumb" and find_spec("rich") is not None


def _is_terminal(stream: TextIO | None) -> bool:  # None where it is closed
    return stream is not None and stream.isatty()


def _draw(parts: Any) -> None:
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console(file=sys.stdout, no_color=True if os.environ.get("NO_COLOR") else None)
    for part in parts:
        if isinstance(part, Table):
            drawn = Drawn(box=None, header_style="bold", pad_edge=False)
            for name in part.header:
                drawn.add_column(Text(name))
            for row in part.rows:
                drawn.add_row(*(Text(cell) for cell in row))
            console.print(drawn)
            continue
        text = Text(part)
        text.highlight_regex(_GOOD, "green")
        text.highlight_regex(_BAD, "red")
        console.print(text, soft_wrap=True)
