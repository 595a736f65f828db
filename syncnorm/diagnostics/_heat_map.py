"""A picture of a model's norms over time: one panel for each quantity, a row for each layer, a column for each look."""

# T looks, L layers

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

__all__ = ["QUANTITIES", "heat_map"]

QUANTITIES = {
    "gap": ("evaluation against training", "gap (σ)"),
    "noise": ("noise of the batch mean", "noise (share of the variance)"),
    "drift": ("running statistics across ranks", "drift (σ)"),
}
"""Title and colour of each panel, by key."""

_MOST_NAMES = 40
_DECADES = 3  # further below the largest nothing is told apart


def heat_map(values: Mapping[str, Tensor], layers: Sequence[str], steps: Sequence[int]) -> Any:
    """Draw ``values`` in logarithmic colours that colour-blind people tell apart.

    Args:
        values: By key of :data:`QUANTITIES`, ``[T, L]``; NaN for unknown. A quantity that is never above 0 has no panel.
        layers: Names of the layers, top to bottom.
        steps: Training step of each look, ascending.

    Returns:
        A matplotlib figure, which belongs to nobody else; None if there is nothing to draw.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter

    shown = {key: table.T.numpy() for key, table in values.items() if bool((table > 0).any())}
    if not shown:
        return None
    names = [name if len(name) <= 32 else f"…{name[-31:]}" for name in layers]
    width, height = (
        1 + 0.08 * max(map(len, names)) + 4 * len(shown),
        max(3.2, 1.2 + 0.2 * min(len(layers), _MOST_NAMES)),
    )
    figure = Figure((width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (key, table) in zip(panels, shown.items(), strict=True):
        (title, label), largest = QUANTITIES[key], float(table[table > 0].max())
        lowest = min(max(float(table[table > 0].min()), largest / 10**_DECADES), largest / 2)
        colours = {"norm": LogNorm(lowest, largest), "cmap": "viridis"}
        drawn = table.clip(min=lowest)  # NaN stays, and stays blank
        mesh = panel.pcolormesh(_edges(steps), range(len(layers) + 1), drawn, **colours)
        bar = figure.colorbar(mesh, ax=panel, label=label, extend="min" if (table < lowest).any() else "neither")
        bar.ax.yaxis.set_major_locator(FixedLocator(_ticks(lowest, largest)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.minorticks_off()
        panel.set_facecolor("0.85")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("training step")
        panel.set_title(title, fontsize="medium")
    every = -(-len(layers) // _MOST_NAMES)
    panels[0].set_yticks([row + 0.5 for row in range(0, len(layers), every)], names[::every], fontsize="small")
    panels[0].set_ylabel("layer" if every == 1 else f"layer (one in {every} is named)")
    panels[0].invert_yaxis()
    return figure


def _edges(steps: Sequence[int]) -> list[float]:
    """Limits of the columns: half-way between looks."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade from ``low`` to ``high``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in decades for digit in (1, 2, 5) if low <= (tick := digit * 10.0**power) <= high]
