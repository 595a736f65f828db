"""``plot``: results that other commands wrote, as a figure."""

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from syncnorm.cli._arguments import Equals
from syncnorm.cli._files import atomic, refuse_existing
from syncnorm.conversion._table import Report

__all__ = ["plot"]

Row = dict[str, Any]
_DEMO = {"variant", "seed", "epoch", "test_error_percent", "ms_per_step", "ranks", "batch_per_rank"}
_OF = (
    "dtype",
    "shape",
    "layout",
    "layers",
    "mode",
    "ranks",
    "channels",
    "way",
    "ours",
)  # what a row of a benchmark is of
_SPREAD = re.compile(r"([\d.]+) \[([\d.]+)–([\d.]+)\]")


@dataclass(frozen=True)
class _Drawn(Report):
    """Where the figure is, and of what."""

    file: str
    of: str

    def parts(self) -> list[str]:
        return [f"{self.file}: {self.of}"]


def plot(
    results: Path,
    *,
    out: Path | None = None,
    x: str | None = None,
    y: str | None = None,
    by: str | None = None,
    where: Equals = (),
    force: bool = False,
) -> Report:
    """Draw a figure from results: a CSV of the demo, the study or Lightning's CSVLogger, a JSON of a benchmark.

    What the demo and the benchmarks write is recognised. Of another CSV, such as the study's, say which columns to draw:
    the mean and standard deviation of --y over all rows that share --x, with a line for each value of --by, and a level one for
    rows without --x. A CSV that has steps or epochs, as Lightning's metrics.csv, is drawn over these where nothing is said.

    Args:
        results: demo.csv, metrics.csv, or any CSV with a header; or what bench --json or scripts/bench.py --out wrote.
        out: Figure to write, in the format of its name; by default beside the results, as PNG.
        x: Column for the horizontal axis.
        y: Column for the vertical axis.
        by: Column whose values get a line each.
        where: Only rows in which a column has this value, such as lr=0.03.
        force: Overwrite the figure.
    """
    out = out or results.with_suffix(".png")
    refuse_existing(out, force)
    text = results.read_text(encoding="utf-8-sig")  # a spreadsheet begins with a byte-order mark
    if find_spec("matplotlib") is None:
        raise ImportError("a figure needs matplotlib, which is not there: pip install syncnorm[plot]")
    figure, of = _benchmark(results, text) if results.suffix == ".json" else _columns(results, text, x, y, by, where)
    from syncnorm.diagnostics._figures import save

    supported = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".") not in supported:
        raise ValueError(f"{out} must end in one of {sorted(supported)}, which say the format.")
    with atomic(out) as unfinished:
        save(figure, unfinished)
    return _Drawn(str(out), of)


def _columns(
    path: Path, text: str, x: str | None, y: str | None, by: str | None, where: Sequence[str]
) -> tuple[Any, str]:
    """A figure of a CSV, and what it is of."""
    from syncnorm.diagnostics._figures import demo_figure, history_figure, series_figure

    rows = [
        {name: _value(value) for name, value in row.items()}
        for row in csv.DictReader(text.splitlines())
        if None not in row
    ]
    if not rows:
        raise ValueError(f"{path} has no rows: a CSV with a header and at least one row is needed.")
    columns = list(rows[0])
    for column, _, value in (condition.partition("=") for condition in where):
        if column not in columns:
            raise ValueError(f"--where takes COLUMN=VALUE with a column of {path}, got {column!r}; it has {columns}.")
        values = list(dict.fromkeys(str(row[column]) for row in rows))
        rows = [row for row in rows if row[column] == _value(value)]
        if not rows:
            raise ValueError(f"no row of {path} has {column}={value}; there are {values}.")
    if not (x or y or by) and {*columns} >= _DEMO:
        return demo_figure(rows), "the demo's test error and cost"
    for option, name in (("--x", x), ("--y", y), ("--by", by)):
        if name is not None and name not in columns:
            raise ValueError(f"{option} must be a column of {path}, got {name!r}; it has {columns}.")
    if x and y:
        _need_numbers(path, rows, x)
        _need_numbers(path, rows, y)
        return series_figure(rows, x, y, by), f"{y} over {x}" + (f" by {by}" if by else "")
    over = x or next((name for name in ("step", "epoch") if name in columns), None)
    if over is None or by or (x and not y):
        raise ValueError(f"say which columns of {path} to draw with --x and --y, and --by for lines; it has {columns}.")
    ys = [y] if y else [name for name in columns if name not in (over, "epoch", "step") and _numbers(rows, name)]
    if not ys or not _numbers(rows, over):
        raise ValueError(f"{path} has no numbers to draw over {over!r}; it has the columns {columns}.")
    return history_figure(rows, over, ys), f"{', '.join(ys)} over {over}"


def _benchmark(path: Path, text: str) -> tuple[Any, str]:
    """A figure of a benchmark's JSON, and what it is of."""
    from syncnorm.diagnostics._figures import ratio_figure

    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    try:
        groups = _groups(content)
    except (KeyError, TypeError, ValueError):
        groups = {}
    if not groups:
        raise ValueError(f"{path} is of no benchmark: what bench --json or scripts/bench.py --out wrote is needed.")
    return ratio_figure(groups, "relative time, median and middle half"), f"ratios of {', '.join(groups)}"


def _groups(content: Any) -> dict[str, list[tuple[str, float, float, float]]]:
    """By part of a benchmark, its ratios; an error, or nothing, for what is none."""
    groups: dict[str, list[tuple[str, float, float, float]]] = {}
    if isinstance(content, dict) and "one_process" in content:
        for part, title in (("one_process", "in one process"), ("processes", f"on {content.get('ranks')} processes")):
            points = [
                (f"{row['layer']} {row['backend']}".strip(), row["ratio"], row["low"], row["high"])
                for row in content[part]
            ]
            if points:
                groups[f"{title}: {content.get('of')}"] = points
    elif isinstance(content, dict):
        for part, table in content.items():
            points = [point for row in _table_rows(table) for point in _points(row)]
            if points:
                groups[part] = points
    return groups


def _table_rows(table: Any) -> list[Row]:
    rows = table.get("rows", []) if isinstance(table, dict) else []
    return [row for row in rows if isinstance(row, dict)]


def _points(row: Row) -> list[tuple[str, float, float, float]]:
    """The ratios in a row of ``scripts/bench.py``, labelled by their column and by what the row is of."""
    found = {name: match for name, value in row.items() if (match := _SPREAD.fullmatch(str(value)))}
    of = [
        str(value)
        for name, value in row.items()
        if name in ("shape", "layout", "dtype", "layers", "mode", "ours", "ranks", "way")
    ]
    label = " ".join(value for value in of if value and not _SPREAD.fullmatch(value))
    return [(f"{label}: {name}", *_ordered(match)) for name, match in found.items()]


def _ordered(match: "re.Match[str]") -> tuple[float, float, float]:
    median, low, high = map(float, match.groups())
    return median, low, high


def _value(text: str | None) -> Any:
    try:
        return float(text or "nan")
    except ValueError:
        return text


def _numbers(rows: Sequence[Row], column: str) -> bool:
    return any(isinstance(row[column], float) and math.isfinite(row[column]) for row in rows)


def _need_numbers(path: Path, rows: Sequence[Row], column: str) -> None:
    strange = next((row[column] for row in rows if not isinstance(row[column], float)), None)
    if strange is not None or not _numbers(rows, column):
        raise ValueError(f"the column {column!r} of {path} must hold numbers to be drawn, and has {strange!r}.")
