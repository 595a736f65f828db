"""Results as figures: rows of a CSV or of a benchmark go in, a matplotlib figure comes out. No window, no global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

__all__ = ["demo_figure", "history_figure", "ratio_figure", "save", "series_figure"]

Row = Mapping[str, Any]

# Okabe & Ito, told apart by everyone; a marker for each, for those who print without colour.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST = 6  # axes below one another that a page can hold


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the name says."""
    figure.savefig(path, dpi=150)


def demo_figure(rows: Sequence[Row]) -> Figure:
    """The demo's: test error over the epochs, every seed and their mean, and what a step costs.

    Args:
        rows: One for each variant, seed and epoch, as ``demo.csv`` has them.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(f"Handwritten digits on {rows[0]['ranks']:g} ranks at {rows[0]['batch_per_rank']:g} samples each")
    for variant, (colour, marker) in zip(variants, _styles(len(variants)), strict=True):
        mine = [row for row in rows if row["variant"] == variant]
        for seed in {row["seed"] for row in mine}:
            one = [row for row in mine if row["seed"] == seed]
            left.plot(
                [row["epoch"] for row in one], [row["test_error_percent"] for row in one], color=colour, alpha=0.3, lw=1
            )
        points = _means(mine, "epoch", "test_error_percent")
        left.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker=marker, lw=2, label=variant)
    lowest = min(row["test_error_percent"] for row in rows)
    left.set(xlabel="epoch", ylabel="test error (%)", yscale="log", ylim=(1 if lowest >= 1 else 0.1, 100))
    epochs = sorted({int(row["epoch"]) for row in rows})
    left.set_xticks([epoch for epoch in epochs if len(epochs) <= 12 or epoch % 5 == 0])
    left.set_yticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= left.get_ylim()[0]])
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    seeds = len({row["seed"] for row in rows})
    if seeds > 1:
        left.set_title(f"{seeds} seeds (thin) and their mean", fontsize=10)
    left.grid(axis="y", alpha=0.3)
    left.legend(frameon=False)

    costs = [fmean(row["ms_per_step"] for row in rows if row["variant"] == variant) for variant in variants]
    bars = right.barh(variants, costs, color=_COLOURS[: len(variants)], height=0.6)
    firsts = [next(row for row in rows if row["variant"] == variant) for variant in variants]
    counts = [f"{row['norm_collectives_per_step']:g} + {row['ddp_collectives_per_step']:g}" for row in firsts]
    labels = [f"{cost:.1f} ms\n{count} collectives" for cost, count in zip(costs, counts, strict=True)]
    right.bar_label(bars, labels, padding=4, fontsize=9)
    right.set(xlabel="time per step (ms)", xlim=(0, 1.6 * max(costs)))
    right.set_title("collectives per step: norm layers + DDP buckets", fontsize=10)
    right.invert_yaxis()
    return _bare(figure)


def ratio_figure(groups: Mapping[str, Sequence[tuple[str, float, float, float]]], xlabel: str) -> Figure:
    """Ratios as points with the middle half of their spread, one panel for each group; 1 is drawn as a line.

    Args:
        groups: By title, for each point a label, the median and the ends of the spread.
        xlabel: What the ratios are.
    """
    heights = [len(points) for points in groups.values()]
    figure = Figure(figsize=(8, 1.2 * len(heights) + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, points) in zip(panels, groups.items(), strict=True):
        labels, medians, lows, highs = zip(*points, strict=True)
        at = range(len(points))
        errors = [
            [m - low for m, low in zip(medians, lows, strict=True)],
            [h - m for m, h in zip(medians, highs, strict=True)],
        ]
        panel.errorbar(medians, at, xerr=errors, fmt="o", color=_COLOURS[1], capsize=3)
        panel.axvline(1, color="black", lw=0.8, ls="--")
        panel.set_yticks(at, labels)
        panel.set_ylim(len(points) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.set_title(title, fontsize=10, loc="left")
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(xlabel)
    return _bare(figure)


def series_figure(rows: Sequence[Row], x: str, y: str, by: str | None = None) -> Figure:
    """``y`` over ``x``: mean and standard deviation over the rows that share ``x``, a line for each value of ``by``.

    Rows without ``x``, of something that does not depend on it, are a dashed line at their mean.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row[by] for row in rows)) if by else [""]
    means: list[float] = []
    for name, (colour, marker) in zip(names, _styles(len(names)), strict=True):
        mine = [row for row in rows if _is_number(row[y]) and (not by or row[by] == name)]
        points = _means([row for row in mine if _is_number(row[x])], x, y)
        level = [row[y] for row in mine if not _is_number(row[x])]
        if points:
            xs, ys, deviations = zip(*points, strict=True)
            axes.errorbar(xs, ys, yerr=deviations, color=colour, marker=marker, capsize=3, label=str(name))
            means += ys
        if level:
            axes.axhline(fmean(level), color=colour, ls="--", label=f"{name}, any {_words(x)}" if points else str(name))
            means.append(fmean(level))
    ticks = sorted({row[x] for row in rows if _is_number(row[x])})
    if len(ticks) <= 12:
        if min(ticks) > 0 and max(ticks) >= 8 * min(ticks):
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=_words(x), ylabel=_words(y), title="mean ± standard deviation")
    if min(means) > 0 and max(means) >= 10 * min(means):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if by:
        axes.legend(title=_words(by), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _bare(figure)


def history_figure(rows: Sequence[Row], x: str, ys: Sequence[str]) -> Figure:
    """Each of ``ys`` over ``x`` on axes of its own, as a run logged them; where a row has none, there is none."""
    ys = ys[:_MOST]
    figure = Figure(figsize=(8, 1.2 + 1.8 * len(ys)), layout="constrained")
    panels = figure.subplots(len(ys), 1, squeeze=False, sharex=True)[:, 0]
    for panel, y in zip(panels, ys, strict=True):
        there = [(row[x], row[y]) for row in rows if _is_number(row[x]) and _is_number(row[y])]
        panel.plot(*zip(*there, strict=True), color=_COLOURS[1], marker="o" if len(there) < 50 else None)
        panel.set_ylabel(y)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel(_words(x))
    return _bare(figure)


def _means(rows: Sequence[Row], x: str, y: str) -> list[tuple[float, float, float]]:
    """x, mean and standard deviation of y, in the order of x."""
    found = []
    for at in sorted({row[x] for row in rows}):
        values = [row[y] for row in rows if row[x] == at and _is_number(row[y])]
        if values:
            found.append((at, fmean(values), stdev(values) if len(values) > 1 else 0.0))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _styles(count: int) -> list[tuple[str, str]]:
    return [(_COLOURS[i % len(_COLOURS)], _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]) for i in range(count)]


def _words(column: str) -> str:
    """``test_error_percent`` as ``test error (%)``."""
    for ending, unit in (("_percent", "%"), ("_ms", "ms"), ("_seconds", "s"), ("_std", "σ")):
        if column.endswith(ending):
            return f"{column.removesuffix(ending).replace('_', ' ')} ({unit})"
    return column.replace("_", " ")


def _bare(figure: Figure) -> Figure:
    for axes in figure.get_axes():
        assert isinstance(axes, Axes)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
