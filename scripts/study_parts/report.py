"""Fills the document's template with numbers from the CSV files, draws the figures, and says which gates hold.

In the template, ``[[experiment column factor=value ...]]`` is a mean ± standard deviation over seeds, ``as=.1e`` another
format, ``only=mean`` the mean alone, ``factor=-`` asks for rows without it;
``[[table experiment rows=a columns=b value=c factor=value ...]]`` is a table, ``[[gates]]`` the gates, ``[[time]]`` what the
run took in minutes.
"""

import math
import re
import shlex
import sys
from pathlib import Path

from study_parts import gates
from study_parts.results import Results, Value

TEMPLATE = Path(__file__).with_name("study.template.md")


def write(folder: Path, figures: Path, document: Path) -> int:
    """Everything, from the CSV files in ``folder``; 1 if a gate does not hold, 2 if results are missing."""
    from study_parts import figures as drawn

    results = Results(folder)
    try:
        document.write_text(render(TEMPLATE.read_text(), results))
    except LookupError as missing:
        print(f"study.py: {missing} Run: python scripts/study.py run", file=sys.stderr)
        return 2
    names = drawn.draw(results, figures)
    print(f"wrote {document} and {len(names)} figures in {figures}")
    return show_gates(results)


def show_gates(results: Results) -> int:
    checked = gates.check(results)
    for gate in checked:
        print(f"{'holds' if gate.holds else 'FAILS'}: {gate.experiment}: {gate.sentence}: {gate.measured}")
    return 0 if all(gate.holds for gate in checked) else 1


def render(template: str, results: Results) -> str:
    def fill(match: re.Match[str]) -> str:
        first, *rest = shlex.split(match[1])
        if first == "gates":
            return _gates(results)
        if first == "time":
            return _minutes(results)
        if first == "table":
            return _table(results, rest[0], _pairs(rest[1:]))
        column, *pairs = rest
        return number(results, first, column, _pairs(pairs))

    return re.sub(r"\[\[(.+?)\]\]", fill, template)


def _pairs(words: list[str]) -> dict[str, str | None]:
    pairs = (word.split("=", 1) for word in words)
    return {name: None if value == "-" else value for name, value in pairs}


def number(results: Results, experiment: str, column: str, factors: dict[str, str | None]) -> str:
    form, only = factors.pop("as", None), factors.pop("only", None)
    value = results.value(experiment, column, **factors)
    return text(value, form, mean_only=only == "mean")


def text(value: Value, form: str | None = None, *, mean_only: bool = False) -> str:
    """A value as the document shows it; '–' where the layer refused."""
    if math.isnan(value.mean):
        return "–"
    if form is None and max(map(abs, value.values)) < 1e-9:
        return "0"
    if form is None and value.sd == 0 and value.mean.is_integer():
        form = ".0f"
    if form is None:
        form = ".1f" if abs(value.mean) >= 3 else ".2f"
    if mean_only or math.isnan(value.sd) or value.sd == 0:
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} ± {value.sd:{form}}"


def _table(results: Results, experiment: str, words: dict[str, str | None]) -> str:
    row, column, shown = words.pop("rows"), words.pop("columns", None), words.pop("value")
    form = words.pop("as", None)
    lines = []
    if column is None:  # the columns are values
        names = [pair.split(":") for pair in shown.split(",")]
        lines.append([row, *(label for _, label in names)])
        for level in results.levels(experiment, row, **words):
            cells = (results.value(experiment, name, **{row: level}, **words) for name, _ in names)
            lines.append([str(level), *(text(cell, form) for cell in cells)])
    else:
        levels = results.levels(experiment, column, **words)
        lines.append([f"{row} \\ {column}", *map(str, levels)])
        for level in results.levels(experiment, row, **words):
            cells = [_cell(results, experiment, shown, {row: level, column: at, **words}, form) for at in levels]
            if not any(cells):  # the column's factor does not matter to this row
                cells = [_cell(results, experiment, shown, {row: level, column: None, **words}, form), *cells[1:]]
            lines.append([str(level), *cells])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _cell(results: Results, experiment: str, column: str, factors: dict[str, object], form: str | None) -> str:
    if not results.has(experiment, **factors):
        return ""
    return text(results.value(experiment, column, **factors), form)


def _gates(results: Results) -> str:
    lines = ["| what must hold | measured | |", "|---|---|---|"]
    lines += [f"| {g.sentence} | {g.measured} | {'yes' if g.holds else '**no**'} |" for g in gates.check(results)]
    return "\n".join(lines)


def _minutes(results: Results) -> str:
    seconds = 0.0
    for path in sorted(results.folder.glob("*.csv")):
        seconds += sum({row["key"]: float(row["cell_seconds"]) for row in results.rows(path.stem)}.values())
    return f"{seconds / 60:.0f}"
