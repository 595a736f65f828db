"""How the study's figures look. Colours are Okabe & Ito's, and every line has a marker of its own."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from study_parts.results import Results, Value

COLOURS = {
    "BN": "#D55E00",
    "SyncBN": "#0072B2",
    "BatchRenorm": "#E69F00",
    "MABN": "#CC79A7",
    "SwitchableNorm": "#56B4E9",
    "GroupNorm": "#009E73",
    "LayerNorm": "#000000",
    "RMSNorm": "#56B4E9",
    "InstanceNorm": "#CC79A7",
    "DynamicTanh": "#CC79A7",
    "none": "#777777",
}
MARKERS = {
    "BN": "o", "SyncBN": "s", "BatchRenorm": "D", "MABN": "v", "SwitchableNorm": "P", "GroupNorm": "^",
    "LayerNorm": "X", "RMSNorm": "P", "InstanceNorm": "v", "DynamicTanh": "h", "none": "*",
}  # fmt: skip


def bars(axes: Axes, at: Sequence[Any], values: Sequence[Value], colour: str, marker: str, **options: Any) -> None:
    """Means with one standard deviation, downwards to the best seed at most: a logarithm knows no negative error."""
    kept = [(x, value) for x, value in zip(at, values, strict=True) if not math.isnan(value.mean)]
    down = [min(value.sd, value.mean - min(value.values)) for _, value in kept]
    means, up = [value.mean for _, value in kept], [value.sd for _, value in kept]
    axes.errorbar(
        [x for x, _ in kept], means, [down, up], color=colour, marker=marker, capsize=3, linewidth=1.6, **options
    )


def line(axes: Axes, results: Results, experiment: str, label: str, x: str, column: str, **factors: Any) -> None:
    """Mean and standard deviation of ``column`` over a factor ``x``, where there is any."""
    at = results.levels(experiment, x, **factors)
    values = [results.value(experiment, column, **{x: level}, **factors) for level in at]
    bars(axes, at, values, COLOURS.get(label, "#0072B2"), MARKERS.get(label, "o"), label=label)


def dots(
    axes: Axes, results: Results, experiment: str, column: str, factor: str, levels: Sequence[Any], **factors: Any
) -> None:
    """One dot for each seed, and their mean as a bar across, for each level of a factor from top to bottom."""
    for at, level in enumerate(levels):
        value = results.value(experiment, column, **{factor: level}, **factors)
        colour = COLOURS.get(str(level), "#0072B2")
        axes.plot(value.values, [at] * len(value.values), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([value.mean], [at], "|", color=colour, markersize=18, markeredgewidth=3)
    axes.set_yticks(range(len(levels)), [str(level) for level in levels])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def percent(axes: Axes, low: float = 1.0) -> None:
    axes.set(yscale="log", ylim=(low, 100), ylabel="test error (%)")
    axes.set_yticks([tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= low])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)


def batches(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("samples per rank (of 32 on all ranks)")


def new(columns: int, title: str, size: tuple[float, float] = (10, 4.2), **options: Any) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", **options)
    figure.suptitle(title, fontsize=12)
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def flat(axes: Axes, results: Results, experiment: str, methods: Sequence[str], **factors: Any) -> None:
    """Methods that no batch per rank changes, as level lines with a marker in the middle."""
    for method in methods:
        value = results.value(experiment, "error", method=method, **factors)
        axes.axhline(value.mean, color=COLOURS[method], linewidth=1.6, linestyle="--")
        axes.axhspan(value.mean - value.sd, value.mean + value.sd, color=COLOURS[method], alpha=0.12, linewidth=0)
        axes.plot([], [], color=COLOURS[method], linestyle="--", label=f"{method} (any)")
