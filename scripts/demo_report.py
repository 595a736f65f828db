"""What the demo shows at its end: a table, a CSV and a figure, all from the runs that `demo_train.py` wrote."""

import csv
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import torch
from demo_train import LR_AT_32, NUM_TRAIN

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt

Run = dict[str, Any]  # one seed of one variant, as demo_train.py writes it

COLOURS = {"local BN": "#D55E00", "syncnorm": "#0072B2", "GroupNorm": "#009E73"}  # Okabe & Ito: told apart by everyone
MARKERS = {"local BN": "o", "syncnorm": "s", "GroupNorm": "^"}


def final_errors(runs: list[Run]) -> list[float]:
    return [run["errors"][-1] for run in runs]


def largest_drift(runs: list[Run]) -> float | None:
    drifts = [run["drifts"][-1] for run in runs]
    return None if None in drifts else max(drifts)


def table(results: dict[str, list[Run]]) -> str:
    rows = [("", "test error", "drift", "time", "collectives per step"), ("", "%", "σ", "ms/step", "norm layers + DDP")]
    for variant, runs in results.items():
        errors, drift = final_errors(runs), largest_drift(runs)
        error = f"{fmean(errors):.2f}" + (f" ± {stdev(errors):.2f}" if len(errors) > 1 else "")
        counts = f"{runs[0]['norm_collectives']:g} + {runs[0]['ddp_collectives']:g}"
        shown = "no statistics" if drift is None else "0" if drift == 0 else f"{drift:.2f}"
        rows.append((variant, error, shown, f"{fmean(r['ms_per_step'] for r in runs):.1f}", counts))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "   ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(2, "   ".join("-" * w for w in widths))
    num_seeds = len(next(iter(results.values())))
    return "\n".join(lines) + (
        f"\n\ntest error: of each rank's own copy on {1797 - NUM_TRAIN} images, mean over the ranks"
        + (f" and ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "")
        + "\ndrift: the largest gap between two ranks' running means, in running standard deviations of that channel"
        "\ncollectives: counted by the profiler; DDP's are its gradient buckets, which every variant needs"
    )


def write_csv(path: Path, results: dict[str, list[Run]], settings: dict[str, Any]) -> None:
    """One row for each variant and seed; the collectives are counted with the first seed."""
    lr = LR_AT_32 * settings["ranks"] * settings["batch_per_rank"] / 32
    rows = [
        {
            "variant": variant,
            "seed": run["seed"],
            "test_error_percent": run["errors"][-1],
            "drift_std": run["drifts"][-1],
            "ms_per_step": run["ms_per_step"],
            "norm_collectives_per_step": runs[0]["norm_collectives"],
            "ddp_collectives_per_step": runs[0]["ddp_collectives"],
            **settings,
            "lr": lr,
            "torch": torch.__version__,
        }
        for variant, runs in results.items()
        for run in runs
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_figure(path: Path, results: dict[str, list[Run]], title: str) -> None:
    """Left: test error over the epochs, every seed and their mean. Right: what a step costs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 2), layout="constrained")
    figure.suptitle(f"Handwritten digits on {title}")
    for variant, runs in results.items():
        epochs = range(1, len(runs[0]["errors"]) + 1)
        mean = [fmean(at) for at in zip(*(run["errors"] for run in runs), strict=True)]
        for run in runs:
            left.plot(epochs, run["errors"], color=COLOURS[variant], alpha=0.3, linewidth=1)
        left.plot(epochs, mean, color=COLOURS[variant], marker=MARKERS[variant], linewidth=2, label=variant)
    lowest = min(min(run["errors"]) for runs in results.values() for run in runs)
    left.set(xlabel="epoch", ylabel="test error (%)", yscale="log", ylim=(1 if lowest >= 1 else 0.1, 100))
    left.set_xticks([epoch for epoch in epochs if len(epochs) <= 12 or epoch % 5 == 0])
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    left.set_yticks([tick for tick in ticks if tick >= left.get_ylim()[0]])
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    if len(runs) > 1:
        left.set_title(f"{len(runs)} seeds (thin) and their mean", fontsize=10)
    left.grid(axis="y", alpha=0.3)
    left.legend(frameon=False)

    costs = [fmean(run["ms_per_step"] for run in runs) for runs in results.values()]
    bars = right.barh(list(results), costs, color=[COLOURS[variant] for variant in results], height=0.6)
    counts = [f"{runs[0]['norm_collectives']:g} + {runs[0]['ddp_collectives']:g}" for runs in results.values()]
    labels = [f"{cost:.1f} ms\n{count} collectives" for cost, count in zip(costs, counts, strict=True)]
    right.bar_label(bars, labels, padding=4, fontsize=9)
    right.set(xlabel="time per step (ms)", xlim=(0, 1.6 * max(costs)))
    right.set_title("collectives per step: norm layers + DDP buckets", fontsize=10)
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
