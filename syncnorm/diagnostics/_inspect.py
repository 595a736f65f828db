"""What normalisation there is in a model, and what in it deserves a second look."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from syncnorm.conversion._layers import Layer, display, keeps_batch_statistics, origin_of, walk
from syncnorm.conversion._table import Report, Table
from syncnorm.conversion._verdict import judge
from syncnorm.modules import EvoNormS0, FilterResponseNorm, SyncStatistics
from syncnorm.modules._lstm import NormLSTM
from syncnorm.modules._over_ranks import OverRanks

__all__ = ["NormReport", "NormRow", "inspect"]

_OTHERS = (
    _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, FilterResponseNorm,
    EvoNormS0, OverRanks, NormLSTM,
)  # fmt: skip
_STATISTICS = ("running_mean", "running_var", "running_mean_l0", "mean")  # a batch norm's, an LSTM's, a RunningNorm's


@dataclass(frozen=True)
class NormRow:
    """One normalisation layer.

    Attributes:
        name: Its first qualified name; empty for a model that is itself the layer.
        aliases: Its other names.
        type: Its class.
        features: Channels, the normalised shape, or the hidden size of an LSTM.
        affine: ``"weight, bias"``, ``"weight"`` or ``"no"``.
        dtype: Of the running statistics; empty without.
        group: Which ranks share its statistics; ``"local"`` for none but this one, ``"sample"`` where no batch is used.
        notes: What deserves a second look.
    """

    name: str
    aliases: tuple[str, ...]
    type: str
    features: str
    affine: str
    dtype: str
    group: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class NormReport(Report):
    """The normalisation layers of a model; prints as a table.

    Attributes:
        rows: One per layer, in the model's order.
    """

    rows: tuple[NormRow, ...]

    def parts(self) -> list[str | Table]:
        if not self.rows:
            return ["no normalisation layer of torch, syncnorm or like torch's batch norm"]
        counts = Counter(row.type for row in self.rows)
        head = ", ".join(f"{number} × {kind}" for kind, number in counts.items())
        header = ("layer", "class", "features", "affine", "statistics", "group", "notes")
        rows = [
            (
                display(row.name), row.type, row.features, row.affine, row.dtype, row.group,
                "; ".join([*row.notes, *(f"also {alias}" for alias in row.aliases)]),
            )
            for row in self.rows
        ]  # fmt: skip
        return [head, Table(header, rows)]


def inspect(model: nn.Module) -> NormReport:
    """Report every normalisation layer of ``model`` and what deserves a second look. Changes nothing, runs nothing.

    Notes tell of layers that :func:`syncnorm.convert` would leave and why, of layers in evaluation mode inside a
    training model, statistics in half precision, non-finite or negative running variances, and layers that took
    another's place.

    Args:
        model: Any module.

    Returns:
        A :class:`NormReport`; ``print`` it.

    Raises:
        TypeError: If ``model`` is not a module.

    Example:
        >>> report = syncnorm.inspect(torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.LayerNorm(8)))
        >>> [(row.type, row.group) for row in report.rows]
        [('BatchNorm1d', 'local'), ('LayerNorm', 'sample')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inspect takes an nn.Module, got {type(model).__name__}.")
    layers: dict[int, Layer] = {}
    for place in walk(model):
        if keeps_batch_statistics(place.module) or origin_of(place.module) or isinstance(place.module, _OTHERS):
            layer = layers.setdefault(id(place.module), Layer(place.module, metric=place.metric))
            layer.names.append(place.name)
            layer.metric = layer.metric and place.metric
    return NormReport(tuple(_row(layer, model) for layer in layers.values()))


def _row(layer: Layer, model: nn.Module) -> NormRow:
    module = layer.module
    running = [_tensor(module, name) for name in _STATISTICS]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in running if t is not None})
    own = [name for name in ("weight", "bias") if isinstance(module, NormLSTM) or _tensor(module, name) is not None]
    return NormRow(
        name=layer.names[0],
        aliases=tuple(layer.names[1:]),
        type=type(module).__name__,
        features=_features(module),
        affine=", ".join(own) or "no",
        dtype="/".join(dtypes),
        group=_group(module),
        notes=tuple(_notes(layer, model)),
    )


def _features(module: nn.Module) -> str:
    if isinstance(module, nn.GroupNorm):
        return f"{module.num_channels} in {module.num_groups} groups"
    for name in ("num_features", "normalized_shape", "dim", "hidden_size", "shape"):
        if hasattr(module, name):
            value = getattr(module, name)
            return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)
    statistic = _tensor(module, "running_mean")
    return "" if statistic is None else str(statistic.numel())


def _group(module: nn.Module) -> str:
    if isinstance(module, SyncStatistics | OverRanks):
        return str(module._group_spec) if module._sync else f"{module._group_spec}, disabled"
    if isinstance(module, nn.SyncBatchNorm):
        return "world" if module.process_group is None else "its own"
    return "local" if keeps_batch_statistics(module) else "sample"


def _notes(layer: Layer, model: nn.Module) -> list[str]:
    module, notes = layer.module, []
    origin = origin_of(module)
    if origin is not None:
        notes.append(f"in place of {type(origin.module).__name__}")
    if keeps_batch_statistics(module):
        verdict = judge(layer, "sync_batch_norm", {})
        if verdict.action == "skip" and origin is None:
            notes.append(f"convert would leave it: {verdict.reason}")
        if getattr(module, "momentum", 0.1) is None:
            notes.append("momentum=None, a cumulative average")
        if _tensor(module, "running_var") is None and not isinstance(module, nn.modules.lazy.LazyModuleMixin):
            notes.append("no running statistics: evaluation uses the batch")
        if isinstance(module, SyncStatistics) and module.accumulate > 1:
            notes.append(f"statistics over {module.accumulate} micro-batches")
    if model.training and not module.training:
        notes.append("in evaluation mode, the model is not")
    return notes + _doubts(module)


def _doubts(module: nn.Module) -> list[str]:
    doubts = []
    mean, var = _tensor(module, "running_mean"), _tensor(module, "running_var")
    for name, statistic in (("running_mean", mean), ("running_var", var)):
        if statistic is None:
            continue
        if statistic.dtype in (torch.float16, torch.bfloat16):
            doubts.append(f"{name} in half precision, which a momentum of 0.1 hardly moves")
        if statistic.is_meta:
            continue
        bad = int((~statistic.isfinite()).sum())
        if bad:
            doubts.append(f"{name} is not finite in {bad} of {statistic.numel()} channels")
    if var is not None and not var.is_meta and bool((var < 0).any()):
        doubts.append(f"running_var is negative in {int((var < 0).sum())} of {var.numel()} channels")
    return doubts


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        return None
    return tensor
