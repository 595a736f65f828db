"""What a report is to show, and whether it does: each target beside what was measured."""

from collections.abc import Iterator
from typing import Any

Rows = list[dict[str, Any]]

LARGE, SMALL = ("(64, 256, 56, 56)", "(16, 64, 224, 224)"), ("(32, 2048, 7, 7)",)
PRIMITIVES = ("moments", "normalize", "backward reduce", "backward input")
TESTS = ("kernels", "training", "ranks", "large")


def lines(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A table in Markdown, of the parts that have rows."""
    rows = {name: part["rows"] for name, part in parts.items()}
    yield "| target | measured | |"
    yield "|---|---|---|"
    for name, bound, values in _targets(rows):
        if values:
            worst = min(values) if bound >= 0 else max(values)
            met = worst >= bound if bound >= 0 else worst <= -bound
            yield f"| {name} {'≥' if bound >= 0 else '≤'} {abs(bound)} | {worst:.2f} | {'met' if met else '**missed**'} |"
        else:
            yield f"| {name} {'≥' if bound >= 0 else '≤'} {abs(bound)} | not measured | |"
    for name in TESTS:
        outcomes = [row["outcome"] for row in rows.get(name, [])]
        if outcomes:
            failed = sum(outcome in ("failed", "error") for outcome in outcomes)
            passed = outcomes.count("passed")
            yield f"| no test of `{name}` fails | {failed} of {passed + failed} | {'**missed**' if failed else 'met'} |"


def _targets(rows: dict[str, Rows]) -> Iterator[tuple[str, float, list[float]]]:
    """Name, bound (negative: at most) and what was measured, of which the worst counts."""
    found = rows.get("primitives", [])
    for primitive in PRIMITIVES:
        for shapes, bound in ((LARGE, 0.9), (SMALL, 0.7)):
            yield (
                f"{primitive} at {' and '.join(shapes)}, of a copy", bound,
                [row["of copy"] for row in found if row["primitive"] == primitive and row["shape"] in shapes],
            )  # fmt: skip
    layers = rows.get("layers", [])
    yield "BatchNorm, of `nn.SyncBatchNorm`'s kernels", -0.8, _ours(layers, "BatchNorm", "nn.SyncBatchNorm's kernels")
    pair = [row for row in rows.get("pair", []) if row["exchange"] == "gloo"]
    yield "BatchNorm of two ranks, of `nn.SyncBatchNorm`", -0.8, _ours(pair, "BatchNorm", "nn.SyncBatchNorm")
    yield "BatchNorm, of `nn.BatchNorm2d`", -1.05, _ours(layers, "BatchNorm", "nn.BatchNorm2d")
    added = "BatchNorm, add, ReLU"
    yield "BatchNorm, add and ReLU, of the three apart", -0.6, _ours(layers, added, "nn.BatchNorm2d, add, relu")
    last = [row for row in layers if row["layout"] == "NHWC"]
    yield "GroupNorm and SiLU in NHWC, of torch's", -0.5, _ours(last, "GroupNorm 32, SiLU", "F.group_norm, silu")
    for layer in ("LayerNorm", "RMSNorm"):
        yield f"{layer}, of the best peer", -1.0, _ours(layers, layer, None)


def _ours(rows: Rows, layer: str, provider: str | None) -> list[float]:
    """What ours takes of a provider's time, or of the fastest one's, in each case."""
    cases: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["layer"] != layer or row["provider"] == "ours" or not row["times ours"]:
            continue
        if provider in (None, row["provider"]):
            cases.setdefault((row["shape"], row["layout"], row["dtype"]), []).append(row["times ours"])
    return [1 / min(times) for times in cases.values()]
