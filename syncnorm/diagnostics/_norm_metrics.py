"""The health of a model's batch norms as torchmetrics: fed by a NormProbe, exact over steps and ranks.

Each holds one tensor, and one function merges any number of them, so that it does not matter which rank or step saw what.
"""

# K rows, C channels of all layers together, L layers, R ranks

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from syncnorm.diagnostics._norm_probe import NormProbe, NormReading, is_centred
from syncnorm.diagnostics._norm_rows import (
    Array,
    Input,
    between_share,
    evaluation_gap,
    merge_rows,
    moments_of,
    over_channels,
    over_layers,
)
from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import Group

__all__ = [
    "DeadChannels",
    "EffectiveBatch",
    "ExchangeCost",
    "NormMetric",
    "RenormClipRate",
    "RunningStatDrift",
    "TrainEvalGap",
    "meet",
]


class NormMetric(Metric):
    """Base of the metrics of norms: updated with the reading of a :class:`NormProbe`.

        probe = NormProbe(model)
        gap = TrainEvalGap(probe)
        for batch in loader:
            with probe:
                step(batch)
            gap.update(probe.reading)
        print(gap.compute())

    It does all that torchmetrics do: ``forward``, ``reset``, ``merge_state``, ``MetricCollection``, pickling, and
    ``compute`` over ranks, which may have seen differently much or nothing. It remembers names and sizes, not the model.

    Args:
        norms: A model, or a probe where only some of its layers are meant.
        per_layer: Whether :meth:`compute` gives ``[L]`` tensors in the order of ``names``, or one number for the model.
        **kwargs: As for every torchmetrics Metric.

    Attributes:
        names: Of the layers.
        num_features: Their channels.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update: bool | None = False

    num_rows: ClassVar[int]
    over: ClassVar[Mapping[str, Callable[[list[float]], float]]]  # by key of the result, how layers become one number
    rows: Tensor

    @staticmethod
    def merge(parts: Tensor) -> Tensor:
        """The state of all parts ``[K, C]`` from theirs, ``[R, K, C]``."""
        return merge_rows(parts)

    def __init__(self, norms: nn.Module | NormProbe, *, per_layer: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        probe = norms if isinstance(norms, NormProbe) else NormProbe(norms)
        self.names, self.num_features, self.per_layer = probe.names, probe.num_features, per_layer
        self.add_state("rows", self._empty(), dist_reduce_fx=type(self).merge)

    def update(self, reading: NormReading) -> None:
        """Add what a step did to the norms on this rank."""
        new = self._measured(reading)
        if new.shape != self.rows.shape:
            raise ValueError(
                f"{type(self).__name__} was made for norms with {sum(self.num_features)} channels together, and got the "
                f"reading of a probe on {reading.inputs.size(1)}. Make the metric with that probe."
            )
        self.rows = type(self).merge(torch.stack([self.rows, new.to(self.rows.device)]))

    def take(self, reading: NormReading) -> None:
        """Begin again, with this reading: ``reset`` and ``update`` in one."""
        self._computed, self._update_count = None, 1
        self.rows = self._measured(reading).to(self.rows.device)

    def compute(self) -> dict[str, Tensor]:
        """By key: a number for the model, or with ``per_layer`` one for each layer ``[L]``; NaN where it is not known."""
        layers, device = self.layers(), self.rows.device
        if self.per_layer:
            return {key: torch.from_numpy(values).to(device) for key, values in layers.items()}
        return {key: torch.tensor(v, dtype=torch.float64, device=device) for key, v in self.summary(layers).items()}

    def layers(self) -> dict[str, Array]:
        """By key a number for each layer ``[L]``, of what this rank holds now."""
        with np.errstate(invalid="ignore"):  # NaN is what is not known
            return self._values(self.rows.cpu().numpy())

    def summary(self, layers: Mapping[str, Array]) -> dict[str, float]:
        """One number for the model from those of its layers."""
        return {key: over_layers(layers[key].tolist(), reduce) for key, reduce in self.over.items()}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class, or its state, has seen."""
        super().merge_state(incoming_state)
        self._computed = None

    def _empty(self) -> Tensor:
        return torch.zeros(self.num_rows, sum(self.num_features), dtype=torch.float64)

    def _measured(self, reading: NormReading) -> Tensor:
        """The state of this one reading."""
        raise NotImplementedError

    def _values(self, rows: Array) -> dict[str, Array]:
        """A number for each layer, by key."""
        raise NotImplementedError

    def _mean(self, values: Array) -> Array:
        return over_channels(values, self.num_features)[0]

    def _mean_and_largest(self, key: str, values: Array) -> dict[str, Array]:
        return dict(zip((key, f"{key}_max"), over_channels(values, self.num_features), strict=True))


class RunningStatDrift(NormMetric):
    """How far ranks' running statistics have come apart: what each would evaluate with, at this moment.

    Per channel, the largest difference between two ranks of the running mean, and that of the running standard deviation s
    = √(running variance + eps), √((max m - min m)² + (max s - min s)²), in units of s (by the ranks' mean variance). 0 where
    statistics are synchronised, and in one process. Only the latest update of a rank counts.

    Computes ``drift``, the mean over channels, and ``drift_max``, their largest, in σ; over layers again mean and largest.
    """

    full_state_update = True  # an update takes the place of the one before
    num_rows = 6
    over: ClassVar = {"drift": statistics.fmean, "drift_max": max}

    @staticmethod
    def merge(parts: Tensor) -> Tensor:
        """Number and sum of variances add up; extremes of mean and standard deviation, of which a rank has or has none."""
        sums, lowest, highest = parts[:, :2].sum(0), parts[:, 2::2].amin(0), parts[:, 3::2].amax(0)
        return torch.stack([*sums, lowest[0], highest[0], lowest[1], highest[1]])

    def update(self, reading: NormReading) -> None:
        self.rows = self._empty().to(self.rows.device)
        super().update(reading)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        if isinstance(incoming_state, Metric) and not isinstance(incoming_state, type(self)):
            raise ValueError(f"expected a {type(self).__name__} or its state, got {type(incoming_state).__name__}.")
        self._reduce_states(incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state)
        self._computed = None

    def _empty(self) -> Tensor:
        extremes = torch.tensor([0.0, 0.0, torch.inf, -torch.inf, torch.inf, -torch.inf], dtype=torch.float64)
        return extremes.unsqueeze(1).repeat(1, sum(self.num_features))

    def _measured(self, reading: NormReading) -> Tensor:
        known, mean, var, eps = reading.after.unbind(0)
        var = known * (var + eps)
        rows = torch.stack([known, var, mean, mean, var.sqrt(), var.sqrt()])
        return torch.where(known > 0, rows, self._empty())

    def _values(self, rows: Array) -> dict[str, Array]:
        number, var, low_mean, high_mean, low_std, high_std = rows
        known = number > 0
        apart = np.hypot(
            *(np.where(known, high - low, np.nan) for low, high in ((low_mean, high_mean), (low_std, high_std)))
        )
        return self._mean_and_largest("drift", apart / np.sqrt(var / np.where(known, number, np.nan)))


class TrainEvalGap(NormMetric):
    """How far evaluation would be from training: batches against the running statistics that they found.

    Per channel the root mean square difference, over all samples of all ranks since the last reset, between x̂ by the
    statistics of these samples and x̂ by the running ones (their mean over ranks and updates), before scale and shift:
    √((μ - m)² + Var x·(1 - s/σ)²)/s. Running statistics that lag behind the weights show, and data unlike the data before;
    so does, with few samples, chance: about 1/√(number of samples).

    Computes ``gap`` and ``gap_max``, mean and largest over channels, in σ; over layers again mean and largest.
    """

    num_rows = 7
    over: ClassVar = {"gap": statistics.fmean, "gap_max": max}

    def __init__(self, norms: nn.Module | NormProbe, *, per_layer: bool = False, **kwargs: Any) -> None:
        probe = norms if isinstance(norms, NormProbe) else NormProbe(norms)
        super().__init__(probe, per_layer=per_layer, **kwargs)
        self._centred = tuple(is_centred(layer) for layer in probe.layers.values())

    def _measured(self, reading: NormReading) -> Tensor:
        known = reading.before[:1]
        return torch.cat([reading.inputs[:3], known, known * reading.before[1:]])

    def _values(self, rows: Array) -> dict[str, Array]:
        moments, running = rows[:3], rows[3:]
        if not all(self._centred):  # moving averages take the mean square about a constant, in training and after
            centred = np.repeat(self._centred, self.num_features)
            count, mean, m2 = moments
            centre = running[1] / np.maximum(running[0], 1)
            moments = np.where(centred, moments, np.stack([count, centre, m2 + count * (mean - centre) ** 2]))
        return self._mean_and_largest("gap", evaluation_gap(moments, running))


class EffectiveBatch(NormMetric):
    """How many values share a statistic, and how noisy the statistics of single ranks are.

    ``batch``: values per channel (samples × height × width) behind one statistic, as the layer trains: those of a rank, of a
    ghost, or of all ranks that synchronise. NaN for a layer in evaluation mode. For the model, the smallest.

    ``noise``: the share of the variance that lies between parts, Σ n_p(μ_p - μ)² / Σ (x - μ)², where a part is one call on one
    rank: after one update of each rank, between-rank over total variance. P parts of n values drawn at random have
    (P - 1)/(Pn - 1), about 1/n if there are many; more says that values are not independent. Behind layers that normalise
    each part by itself less is left of it, and of a layer that is called several times in a step the calls' own means are in
    it: :func:`syncnorm.advise` measures each layer alone, and each turn. NaN for a single part. The mean over channels; for
    the model, the largest.
    """

    num_rows = len(Input)
    over: ClassVar = {"batch": min, "noise": max}

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.inputs

    def _values(self, rows: Array) -> dict[str, Array]:
        shared = np.where(rows[Input.STATISTICS] > 0, rows[Input.STATISTICS], np.nan)
        noise = between_share(rows, Input.WITHIN, Input.PARTS)
        return {"batch": self._mean(rows[Input.COUNT] / shared), "noise": self._mean(noise)}


class DeadChannels(NormMetric):
    """Channels that carry no information any longer, by the mean and standard deviation of a layer's output.

    ``dead``: the output hardly varies (by less than 1e-3), or lies below 0 by three standard deviations, so that a ReLU behind
    it is silent. ``saturated``: it varies, and lies above 0 by three, so that a ReLU does nothing, and a sigmoid little.
    Moments and not extremes, because those of a batch of two say nothing. Shares of a layer's channels; over layers the mean.
    """

    num_rows = 3
    over: ClassVar = {"dead": statistics.fmean, "saturated": statistics.fmean}

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.outputs

    def _values(self, rows: Array) -> dict[str, Array]:
        mean, var = moments_of(rows)
        std = np.sqrt(var)
        dead = (std < 1e-3) | (mean + 3 * std <= 0)
        saturated = ~dead & (mean - 3 * std >= 0)
        return {"dead": self._mean(dead + 0 * std), "saturated": self._mean(saturated + 0 * std)}


class _LayerMetric(NormMetric):
    """Of numbers that a layer has one of."""

    @staticmethod
    def merge(parts: Tensor) -> Tensor:
        """All rows add up."""
        return parts.sum(0)

    def _empty(self) -> Tensor:
        return torch.zeros(self.num_rows, len(self.names), dtype=torch.float64)


class RenormClipRate(_LayerMetric):
    """How often batch renormalisation wanted to correct further than its limits let it.

    Computes ``clip_r`` and ``clip_d``, the shares of channels whose r and d were clipped, mean over updates; over layers the
    mean. NaN for layers that are no batch renormalisation in training.
    """

    num_rows = 3
    over: ClassVar = {"clip_r": statistics.fmean, "clip_d": statistics.fmean}

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.clips

    def _values(self, rows: Array) -> dict[str, Array]:
        rates = rows[1:] / np.where(rows[0] > 0, rows[0], np.nan)
        return {"clip_r": rates[0], "clip_d": rates[1]}


class ExchangeCost(_LayerMetric):
    """What the exchanges of our synchronised layers cost a rank in a step, forward and backward.

    Computes ``exchanges``, their number; ``exchange_kb``, kilobytes that a rank hands over; ``exchange_ms``, milliseconds in
    them, waiting for slower ranks included; means over updates and ranks, for the model as a whole, also with ``per_layer``.
    On an accelerator the time is the host's, which goes on while the device waits: use a profiler there.
    """

    num_rows = 4
    over: ClassVar = {"exchanges": statistics.fmean, "exchange_kb": statistics.fmean, "exchange_ms": statistics.fmean}

    def _empty(self) -> Tensor:
        return torch.zeros(self.num_rows, 1, dtype=torch.float64)

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.exchanges.unsqueeze(1)

    def _values(self, rows: Array) -> dict[str, Array]:
        number, num_bytes, seconds = rows[1:] / np.where(rows[0] > 0, rows[0], np.nan)
        return {"exchanges": number, "exchange_kb": num_bytes / 1e3, "exchange_ms": seconds * 1e3}


def meet(metrics: Sequence[NormMetric], group: Group) -> None:
    """Merge the states of all ``metrics`` over the ranks of ``group``, in one gather for all of them.

    Their own ``compute`` would take three collectives for each, and still does unless they were made with
    ``sync_on_compute=False``. Every rank must call this, with the same metrics.
    """
    if group.size == 1:
        return
    flat = torch.cat([metric.rows.flatten() for metric in metrics])
    columns = gather_rows(flat, group).split([metric.rows.numel() for metric in metrics], dim=1)
    for metric, rows in zip(metrics, columns, strict=True):
        metric.rows = type(metric).merge(rows.view(-1, *metric.rows.shape))
        metric._computed = None
