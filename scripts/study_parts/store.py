"""Results on disk: one CSV for each experiment, one row for each seed and setting, written whole after each cell.

A cell is one setting with all its seeds. Its key is a digest of everything in the configuration that decides it, so a run
that was cut off goes on where it was, and a changed setting is run anew.
"""

import csv
import hashlib
import json
import os
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Cell(NamedTuple):
    """One setting of one experiment.

    Attributes:
        experiment: Name of the experiment and of its CSV.
        function: What runs it, a key of ``experiments.FUNCTIONS``.
        factors: What this cell is about, which differs between cells; goes into its rows.
        options: What it shares with the experiment's other cells.
        seeds: Seeds.
        key: Digest of all that.
    """

    experiment: str
    function: str
    factors: Row
    options: Row
    seeds: list[int]
    key: str


def cells(config: dict[str, Any], only: list[str] | None = None) -> list[Cell]:
    """All cells of a configuration, in its order.

    Raises:
        ValueError: If the configuration has not the right shape, or an experiment that ``only`` names is not in it.
    """
    experiments = config.get("experiments")
    if not isinstance(experiments, dict) or not isinstance(config.get("seeds"), int) or config["seeds"] < 1:
        raise ValueError("a study's configuration needs 'seeds', a number of at least 1, and 'experiments'.")
    unknown = sorted(set(only or ()) - set(experiments))
    if unknown:
        raise ValueError(f"no experiment {unknown[0]!r} in the configuration; it has {', '.join(experiments)}.")
    found = []
    for name, spec in experiments.items():
        if only and name not in only:
            continue
        if not isinstance(spec, dict) or "run" not in spec:
            raise ValueError(f"experiment {name!r} needs 'run', the name of a function.")
        seeds = list(range(spec.get("seeds", config["seeds"])))
        options = spec.get("options", {})
        for grid in spec.get("cells", [{}]):
            for values in product(*(value if isinstance(value, list) else [value] for value in grid.values())):
                factors = dict(zip(grid, values, strict=True))
                text = json.dumps([name, spec["run"], factors, options, seeds], sort_keys=True)
                key = hashlib.sha256(text.encode()).hexdigest()[:12]
                found.append(Cell(name, spec["run"], factors, options, seeds, key))
    return found


def read(folder: Path, experiment: str) -> list[Row]:
    """Rows of an experiment, numbers as numbers; empty where a value has no meaning. No rows if it has not been run."""
    path = folder / f"{experiment}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: value(k, text) for k, text in row.items() if text != ""} for row in csv.DictReader(file)]


def value(name: str, text: str) -> Any:
    """A field as what it is: a number, or a word."""
    if name == "key":  # a digest such as 31415e926535 is no number
        return text
    if text.lstrip("-").isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def add(folder: Path, cell: Cell, rows: list[Row], wanted: set[str]) -> None:
    """Add a cell's rows; rows of cells that are no longer ``wanted`` go. The file is replaced at once."""
    assert not any(name in row for row in rows for name in cell.factors), f"{cell.experiment}: a result hides a factor"
    kept = [row for row in read(folder, cell.experiment) if row["key"] in wanted and row["key"] != cell.key]
    shown = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in cell.factors.items()
    }
    new = [shown | {k: _rounded(v) for k, v in row.items()} | {"key": cell.key} for row in rows]
    everything = kept + new
    names = [name for name in dict.fromkeys(name for row in everything for name in row) if name != "key"] + ["key"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.experiment}.csv"
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    os.replace(partial, path)


def finished(folder: Path, experiment: str) -> set[str]:
    """Keys of the cells that are done."""
    return {row["key"] for row in read(folder, experiment)}


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
