"""The study's figures, one function each, from its CSV files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from study_parts.drawing import COLOURS, MARKERS, bars, batches, dots, flat, line, new, percent
from study_parts.results import Results


def draw(results: Results, folder: Path) -> list[str]:
    """Draws the figures whose experiments have been run, and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, (needs, plot) in FIGURES.items():
        if all(results.has(experiment) for experiment in needs):
            figure = plot(results)
            figure.savefig(folder / f"{name}.png", dpi=130)
            plt.close(figure)
            names.append(name)
    return names


def batch_size(results: Results) -> Any:
    figure, panels = new(2, "Handwritten digits: what a small batch per rank does", (10.5, 4.6), sharey=True)
    for axes, experiment, lr, title in zip(
        panels, ("batch_mlp", "batch_resnet"), (0.03, 0.05), ("MLP", "ResNet, maps of 4×4 to 1×1"), strict=True
    ):
        for method in ("BN", "BatchRenorm", "MABN", "SwitchableNorm"):
            line(axes, results, experiment, method, "batch", "error", method=method, lr=lr)
        flat(axes, results, experiment, ("SyncBN", "GroupNorm"), lr=lr)
        axes.set_title(f"{title}, learning rate {lr}", fontsize=10)
        percent(axes)
        batches(axes)
    panels[1].set_ylabel("")
    panels[1].legend(frameon=False, fontsize=9)
    return figure


def rates(results: Results) -> Any:
    figure, (left, middle, right) = new(3, "Digits, MLP: learning rate, scale of the first weights, speed", (13, 4.2))
    methods = ("SyncBN", "GroupNorm", "LayerNorm", "RMSNorm", "DynamicTanh", "none")
    for method in methods:
        line(left, results, "learning_rate", method, "lr", "error", method=method)
    left.set(xscale="log", xlabel="learning rate")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, ncols=6)
    for method in ("SyncBN", "LayerNorm", "RMSNorm", "none"):
        line(middle, results, "initial_scale", method, "scale", "error", method=method)
    middle.set(xscale="log", xlabel="first weights, in torch's own scale")
    for method in methods:
        best = min(
            results.levels("learning_rate", "lr"),
            key=lambda lr, m=method: results.value("learning_rate", "error", method=m, lr=lr).mean,
        )
        steps = (10, 30, 100, 310)
        found = [
            results.value("learning_rate", "error" if s == 310 else f"error_{s}", method=method, lr=best) for s in steps
        ]
        bars(right, steps, found, COLOURS[method], MARKERS[method], label=f"{method}, {best:g}")
    right.set(xscale="log", xlabel="steps, at each method's best rate")
    right.set_xticks([10, 30, 100, 310])
    right.xaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        percent(axes)
    return figure


def shards(results: Results) -> Any:
    figure, (left, right) = new(2, "Digits, MLP: shards that are not alike, and statistics that lag")
    for method in ("BN", "BatchRenorm", "MABN"):
        line(left, results, "non_iid", method, "batch", "error", method=method)
    flat(left, results, "non_iid", ("SyncBN", "GroupNorm"))
    batches(left)
    left.set_title("each step's samples sorted by label before ranks take theirs", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    for momentum, colour, marker in ((0.001, "#D55E00", "o"), (0.01, "#E69F00", "D"), (0.1, "#009E73", "^")):
        for kind, style in (("average", "-"), ("recalibrated", "--")):
            if kind == "recalibrated" and momentum != 0.001:
                continue  # the same for all: training does not see running statistics
            at = results.levels("lagging_statistics", "step")
            found = [results.value("lagging_statistics", f"error_{kind}", momentum=momentum, step=s) for s in at]
            label = f"averages, momentum {momentum:g}" if kind == "average" else "recalibrated"
            look = (colour, marker) if kind == "average" else ("#0072B2", "s")
            bars(right, at, found, *look, linestyle=style, label=label)
    right.set(xlabel="training steps")
    right.set_title("SyncBN, evaluated after so many steps", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        percent(axes)
    return figure


def noise(results: Results) -> Any:
    figure, (left, middle, right) = new(3, "Digits, MLP: the noise of a batch, and dropout", (13, 4.2))
    at = results.levels("noise", "batch", method="BN")
    for axes, column, colour, marker in ((left, "noise", "#0072B2", "s"), (middle, "error", "#D55E00", "o")):
        found = [results.value("noise", column, method="BN", batch=b) for b in at]
        bars(axes, [*at, 32], [*found, results.value("noise", column, method="SyncBN")], colour, marker, label="BN")
        batches(axes)
    left.set(ylabel="noise of logits / their spread between images", ylim=(0, 1))
    left.grid(axis="y", alpha=0.3)
    percent(middle)
    middle.set_title("trained on 200 images", fontsize=10)
    for method, style in (("GroupNorm", "--"), ("LayerNorm", "-."), ("none", ":")):
        value = results.value("noise", "error", method=method)
        middle.axhline(value.mean, color=COLOURS[method], linestyle=style, label=f"{method} (no noise)")
    middle.legend(frameon=False, fontsize=9)
    dots(right, results, "dropout_order", "variance_ratio", "place", ["none", "before", "after", "last"])
    right.set_yticklabels(["no dropout", "before each norm", "after each norm", "before the last layer"])
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xlabel="variance met / variance remembered", xlim=(0, 1.1))
    return figure


def shift(results: Results) -> Any:
    figure, axes = new(1, "Digits, ResNet: trained on clean images, tested on shifted ones", (9, 4.4))
    series: list[tuple[str, dict[str, str], str]] = [
        ("SyncBN", {"method": "SyncBN", "adapted": "none"}, "#D55E00"),
        ("SyncBN + AdaBN", {"method": "SyncBN", "adapted": "AdaBN"}, "#0072B2"),
        ("SyncBN + TENT", {"method": "SyncBN", "adapted": "TENT"}, "#56B4E9"),
        ("GroupNorm", {"method": "GroupNorm", "adapted": "none"}, "#009E73"),
        ("InstanceNorm", {"method": "InstanceNorm", "adapted": "none"}, "#CC79A7"),
    ]
    shifts = results.levels("shifted_domain", "shift")
    for i, (label, factors, colour) in enumerate(series):
        found = [_mean(results, shift=s, **factors) for s in shifts]
        axes.bar(
            [at + 0.15 * (i - 2) for at in range(len(shifts))], [mean for mean, _ in found], 0.14,
            yerr=[sd for _, sd in found], color=colour, label=label, capsize=2, hatch="//" if i in (2, 4) else None,
        )  # fmt: skip
    axes.set_xticks(range(len(shifts)), ["clean", "contrast × 0.3", "brightness + 0.5", "3×3 blur"])
    percent(axes, 0.5)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=5)
    return figure


def _mean(results: Results, **factors: str) -> tuple[float, float]:
    value = results.value("shifted_domain", "error", **factors)
    return value.mean, value.sd


def mechanisms(results: Results) -> Any:
    figure, (left, middle, right) = new(3, "Style, adversaries, targets: every dot a seed, bars their means", (13, 4.2))
    norms = ["none", "BN", "LayerNorm", "GroupNorm", "InstanceNorm"]
    dots(left, results, "style", "style_error", "norm", norms)
    left.axvline(75, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="error of a probe for the exposure (%)", xlim=(0, 85))
    left.set_title("behind random filters and a norm; dotted: chance", fontsize=10)
    dots(middle, results, "gan", "near_percent", "critic", results.levels("gan", "critic"))
    middle.set(xlabel="samples near one of 8 modes (%)", xlim=(-2, 102))
    middle.set_title("GAN on a ring; the norm of its critic", fontsize=10)
    dots(right, results, "rl_target", "relative_error", "target", results.levels("rl_target", "target"))
    right.set(xlabel="error of values / their spread", xscale="log")
    right.set_title("TD(0), no target network", fontsize=10)
    return figure


def attention(results: Results) -> Any:
    figure, (left, right) = new(2, "Digits: tokens and time", (11, 4.4), width_ratios=(1, 1))
    for method in ("BN", "BatchRenorm"):
        line(left, results, "transformer", method, "batch", "error", method=method, lr=0.003, epochs=12)
    for method in ("SyncBN", "LayerNorm", "RMSNorm", "DynamicTanh", "none"):
        value = results.value("transformer", "error", method=method, lr=0.003, epochs=12)
        bars(left, [32], [value], COLOURS[method], MARKERS[method], label=method)
    batches(left)
    percent(left)
    left.set_title("tiny transformer, 12 epochs", fontsize=10)
    left.legend(frameon=False, fontsize=8, ncols=2)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("LSTM, 32", {"cell": "LSTM", "samples": 32, "lr": 0.01}, "error"),
        ("LayerNorm LSTM, 32", {"cell": "LayerNormLSTM", "samples": 32, "lr": 0.01}, "error"),
        ("BatchNorm LSTM, 32", {"cell": "BatchNormLSTM", "samples": 32, "lr": 0.01, "gain": 0.1}, "error"),
        (
            "  its steps' statistics shared",
            {"cell": "BatchNormLSTM", "samples": 32, "lr": 0.01, "gain": 0.1},
            "error_shared",
        ),
        ("LSTM, 8", {"cell": "LSTM", "samples": 8}, "error"),
        ("LayerNorm LSTM, 8", {"cell": "LayerNormLSTM", "samples": 8}, "error"),
        ("BatchNorm LSTM, 8", {"cell": "BatchNormLSTM", "samples": 8, "batch": 8}, "error"),
        ("BatchNorm LSTM, 4 ranks of 2", {"cell": "BatchNormLSTM", "samples": 8, "batch": 2}, "error"),
    ]
    for at, (_, factors, column) in enumerate(cases):
        value = results.value("recurrent", column, **factors)
        colour = {"LSTM": "#777777", "LayerNormLSTM": "#000000"}.get(factors["cell"], "#D55E00")
        right.errorbar([value.mean], [at], xerr=[value.sd], color=colour, marker="o", capsize=3)
    right.set_yticks(range(len(cases)), [label for label, _, _ in cases])
    right.invert_yaxis()
    right.set(xscale="log", xlabel="test error (%)")
    right.set_xticks([1, 2, 5, 10, 20, 50, 100])
    right.xaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    right.grid(axis="x", alpha=0.3)
    right.set_title("digits read row by row, batch of all ranks", fontsize=10)
    return figure


def textures(results: Results) -> Any:
    figure, (left, right) = new(2, "Maps: how many values stand behind a statistic, and how alike they are")
    for method in ("BN", "BatchRenorm"):
        line(left, results, "textures", method, "batch", "error", method=method, lr=0.01)
    flat(left, results, "textures", ("SyncBN", "GroupNorm", "none"), lr=0.01)
    left.set_xscale("log", base=2)
    left.set_xticks([1, 2, 4])
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="scenes per rank (of 8 on all ranks)", ylabel="wrong pixels (%)", ylim=(0, None))
    left.set_title("segmentation of textures, maps of 32×32", fontsize=10)
    left.grid(axis="y", alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    for experiment, model, marker, colour in (
        ("batch_mlp", "MLP: 1 value per sample", "o", "#D55E00"),
        ("batch_resnet", "ResNet, last maps 1×1", "s", "#E69F00"),
        ("effective_count", "ResNet, last maps 2×2", "^", "#0072B2"),
    ):
        lr = {"batch_mlp": {"lr": 0.03}, "batch_resnet": {"lr": 0.05}}.get(experiment, {})
        at = results.levels(experiment, "batch", method="BN", **lr)
        found = [results.value(experiment, "error", method="BN", batch=b, **lr) for b in at]
        bars(right, at, found, colour, marker, label=model)
    batches(right)
    percent(right)
    right.set_title("local BN on digits", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    return figure


def switchable(results: Results) -> Any:
    figure, panels = new(2, "What SwitchableNorm learns to lean on, by batch per rank", sharey=True)
    for axes, experiment, lr in zip(panels, ("batch_mlp", "batch_resnet"), (0.03, 0.05), strict=True):
        for part, colour, marker in (
            ("instance", "#CC79A7", "v"),
            ("layer", "#000000", "X"),
            ("batch", "#0072B2", "s"),
        ):
            at = results.levels(experiment, "batch", method="SwitchableNorm")
            found = [results.value(experiment, f"share_{part}", method="SwitchableNorm", batch=b, lr=lr) for b in at]
            bars(axes, at, found, colour, marker, label=part)
        axes.axhline(1 / 3, color="black", linewidth=0.8, linestyle=":")
        axes.set_title({"batch_mlp": "MLP", "batch_resnet": "ResNet"}[experiment], fontsize=10)
        axes.set(ylabel="share in the variance, mean of layers", ylim=(0.2, 0.5))
        batches(axes)
    panels[0].legend(frameon=False, fontsize=9)
    panels[1].set_ylabel("")
    return figure


def overhead(results: Results) -> Any:
    figure, (left, right) = new(2, "Forward and backward on one CPU thread", (11, 4.8), width_ratios=(3, 2))
    names = [name for name in results.levels("overhead", "layer") if "rows" not in str(name)]
    for axes, chosen, title, reference in (
        (left, names, "maps (16, 64, 28, 28)", "nn.BatchNorm2d"),
        (
            right,
            [n for n in results.levels("overhead", "layer") if "rows" in str(n)],
            "rows (784, 1024)",
            "nn.LayerNorm",
        ),
    ):
        dots(axes, results, "overhead", "relative", "layer", chosen)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"time / time of {reference}", xlim=(0, None))
        axes.set_title(title, fontsize=10)
    return figure


FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Results], Any]]] = {
    "batch_size": (("batch_mlp", "batch_resnet"), batch_size),
    "rates": (("learning_rate", "initial_scale"), rates),
    "shards": (("non_iid", "lagging_statistics"), shards),
    "noise": (("noise", "dropout_order"), noise),
    "shift": (("shifted_domain",), shift),
    "mechanisms": (("style", "gan", "rl_target"), mechanisms),
    "tokens_and_time": (("transformer", "recurrent"), attention),
    "textures": (("textures", "effective_count", "batch_mlp", "batch_resnet"), textures),
    "switchable": (("batch_mlp", "batch_resnet"), switchable),
    "overhead": (("overhead",), overhead),
}
