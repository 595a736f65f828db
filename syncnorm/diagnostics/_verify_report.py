"""The comparison of ranks with one process, as rows and as text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncnorm.conversion._layers import display
from syncnorm.conversion._table import Report, Table
from syncnorm.diagnostics._measure import Measured

__all__ = ["VerifyReport", "VerifyRow", "compare", "forgive_rounding"]

_LAYER = "layer output"


@dataclass(frozen=True)
class VerifyRow:
    """One comparison.

    Attributes:
        kind: ``"layer output"``, ``"output"``, ``"input gradient"``, ``"parameter gradient"`` or ``"buffer"``.
        name: Qualified name or path.
        error: Largest difference, relative to the largest value of the tensor (at least to a tenth of the largest of
            its kind; as it is, where all are zero); infinite where shapes, counters or the presence of a gradient differ.
        ok: Whether that is within the tolerance, or ``rounding``.
        rounding: Whether it is above the tolerance, and no more than what a change of the last bits of parameters and input
            makes in one process.
    """

    kind: str
    name: str
    error: float
    ok: bool
    rounding: bool = False


@dataclass(frozen=True)
class VerifyReport(Report):
    """Whether ranks equal one process; true if they do. Prints as a table.

    Attributes:
        rows: All comparisons, layer outputs first, in the order of the forward pass.
        splits: Samples per rank.
        dtype: Of the computation.
        tolerance: Largest error that counts as equal.
        notes: What was switched off or could not be compared.
        blame: What the plan of the conversion says of each layer.
    """

    rows: tuple[VerifyRow, ...]
    splits: tuple[int, ...]
    dtype: str
    tolerance: float
    notes: tuple[str, ...]
    blame: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every comparison is within the tolerance."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> VerifyRow:
        """The first layer whose output differs; where none does, the row with the largest error."""
        for row in self.rows:
            if row.kind == _LAYER and not row.ok:
                return row
        return max(self.rows, key=lambda row: row.error)

    def parts(self) -> list[str | Table]:
        verdict = "equal" if self.ok else "DO NOT EQUAL"
        head = (
            f"{len(self.splits)} ranks of {list(self.splits)} samples {verdict} one process of {sum(self.splits)} "
            f"({self.dtype}, tolerance {self.tolerance:g})"
        )
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        lines = []
        for kind in kinds:
            rows = [row for row in self.rows if row.kind == kind]
            largest = max(rows, key=lambda row: row.error)
            bad = sum(not row.ok for row in rows)
            lines.append((kind, str(len(rows)), str(bad), f"{largest.error:.1e}", largest.name))
        parts: list[str | Table] = [head, Table(("what", "compared", "differ", "largest error", "in"), lines)]
        if not self.ok:
            first = "first layer that differs" if self.worst.kind == _LAYER else f"worst {self.worst.kind}"
            name = self.worst.name.partition(" (call")[0]
            blame = f" ({self.blame[name]})" if name in self.blame else ""
            parts.append(f"{first}: {self.worst.name}, error {self.worst.error:.1e}{blame}")
        return [*parts, *(f"note: {note}" for note in self.notes)]


def compare(reference: Measured, parts: list[Measured], tolerance: float) -> list[VerifyRow]:
    """Compare what the ranks saw with what one process saw on the whole batch."""
    rows = []
    for kind, pairs in (
        (_LAYER, _layers(reference, parts)),
        ("output", [(name, [_joined([p.outputs[name] for p in parts])], t) for name, t in reference.outputs.items()]),
        (
            "input gradient",
            [(n, [_joined([p.input_grads[n] for p in parts])], t) for n, t in reference.input_grads.items()],
        ),
        (
            "parameter gradient",
            [(n, [_sum([p.param_grads[n] for p in parts])], t) for n, t in reference.param_grads.items()],
        ),
        ("buffer", [(n, [p.buffers.get(n) for p in parts], t) for n, t in reference.buffers.items()]),
    ):
        # The gradient of a bias in front of a norm is 0 but for the rounding of what cancels in it.
        floor = 0.1 * max((_largest(whole) for _, _, whole in pairs), default=0.0)
        for name, found, whole in pairs:
            errors = [_error(tensor, whole, floor) for tensor in found]
            if not all(math.isnan(error) for error in errors):
                worst = max(math.inf if math.isnan(error) else error for error in errors)
                rows.append(VerifyRow(kind, name, worst, worst <= tolerance))
    return rows


def forgive_rounding(rows: list[VerifyRow], nudged: list[list[VerifyRow]]) -> list[VerifyRow]:
    """Accept differences of the size of rounding.

    Args:
        rows: Comparison of ranks with one process.
        nudged: Comparisons of that process, its parameters and input changed in the last bit, with itself.

    Returns:
        The rows. What differs by at most 100 times what the changes made is ``ok``: ranks add up in another order, and with
        other operations.
    """
    made: dict[tuple[str, str], float] = {}
    for row in (row for comparison in nudged for row in comparison if math.isfinite(row.error)):
        made[row.kind, row.name] = max(row.error, made.get((row.kind, row.name), 0.0))
    forgiven = [not row.ok and row.error <= 100 * made.get((row.kind, row.name), 0.0) for row in rows]
    return [replace(row, ok=True, rounding=True) if yes else row for row, yes in zip(rows, forgiven, strict=True)]


_Pairs = list[tuple[str, list[Tensor | None], Tensor | None]]


def _layers(reference: Measured, parts: list[Measured]) -> _Pairs:
    pairs: _Pairs = []
    for (name, whole), *calls in zip(_numbered(reference), *(_numbered(part) for part in parts), strict=False):
        joined = _joined([values for _, values in calls if values.numel()])
        if all(called == name for called, _ in calls) and joined is not None and joined.shape == whole.shape:
            pairs.append((name, [joined], whole))
    return pairs


def _numbered(measured: Measured) -> Iterator[tuple[str, Tensor]]:
    seen: dict[str, int] = {}
    for name, values in measured.layers:
        seen[name] = seen.get(name, 0) + 1
        yield display(name) + (f" (call {seen[name]})" if seen[name] > 1 else ""), values


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there and len(there) == len(tensors) else None


def _sum(tensors: list[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there).sum(0) if there else None


def _error(found: Tensor | None, whole: Tensor | None, floor: float) -> float:
    """Relative error; infinite where the two cannot be compared, NaN where there is nothing on either side."""
    if found is None or whole is None:
        return math.nan if found is whole else math.inf
    if found.shape != whole.shape:
        return math.inf
    if not whole.is_floating_point():
        return 0.0 if torch.equal(found, whole) else math.inf
    if not whole.numel() or torch.equal(found, whole):
        return 0.0
    difference, scale = _difference(found, whole), max(_largest(whole), floor)
    return difference / (scale or 1.0) if math.isfinite(difference) else math.inf


def _difference(found: Tensor, whole: Tensor) -> float:
    # The same infinity, as of a mask, is no difference.
    return float((found.double() - whole.double()).masked_fill(found == whole, 0.0).abs().max())


def _largest(tensor: Tensor | None) -> float:
    """Of the values that say something about rounding: no infinity of a mask, nor what stands for it."""
    if tensor is None or not tensor.is_floating_point():
        return 0.0
    sizes = tensor.abs()
    sizes = sizes[sizes < torch.finfo(tensor.dtype).max / 2]
    return float(sizes.max()) if sizes.numel() else 0.0
