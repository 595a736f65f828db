"""Looks up results: the mean and spread of a column over the seeds of one setting."""

import math
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from study_parts import store
from study_parts.store import Row


class Value(NamedTuple):
    """Mean and standard deviation over seeds; NaN where there is only a refusal, or one seed."""

    mean: float
    sd: float
    values: tuple[float, ...]


class Results:
    """All CSV files of a folder.

    Args:
        folder: Where `study.py run` wrote them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = lru_cache(maxsize=None)(lambda experiment: store.read(folder, experiment))

    def rows(self, experiment: str, **factors: Any) -> list[Row]:
        """Rows with these factors; None as a factor asks for rows without it."""
        return [row for row in self._read(experiment) if all(_same(row.get(k), v) for k, v in factors.items())]

    def has(self, experiment: str, **factors: Any) -> bool:
        return bool(self.rows(experiment, **factors))

    def value(self, experiment: str, column: str, **factors: Any) -> Value:
        """Over the seeds of the one setting that ``factors`` names.

        Raises:
            LookupError: If no cell or several cells have them.
        """
        rows = self.rows(experiment, **factors)
        if len({row["key"] for row in rows}) != 1:
            keys = len({row["key"] for row in rows})
            raise LookupError(f"{experiment} has {keys} cells with {factors}, and one was asked for.")
        found = tuple(float(row[column]) for row in rows if column in row)
        if not found:
            return Value(math.nan, math.nan, ())
        return Value(fmean(found), stdev(found) if len(found) > 1 else math.nan, found)

    def levels(self, experiment: str, factor: str, **factors: Any) -> list[Any]:
        """What a factor takes, numbers in order, words as they come."""
        found = list(dict.fromkeys(row[factor] for row in self.rows(experiment, **factors) if factor in row))
        return sorted(found) if all(isinstance(level, int | float) for level in found) else found


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, str):
        wanted = store.value("", wanted)  # the template's words: 100 is 100.0
    return bool(found == wanted)
