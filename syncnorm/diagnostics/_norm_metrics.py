"""The health of a model's batch norms as torchmetrics: fed by a NormProbe, exact over steps and ranks.

Each holds one tensor, and one function merges any number of them, so that it does not matter which rank or step saw what.
"""

# K rows, C channels of all layers together, L layers, R ranks

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from syncnorm.diagnostics._norm_probe import NormProbe, NormReading, is_centred
from syncnorm.diagnostics._norm_rows import (
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
    over: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]]  # by key of the result, how layers become one number
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
        self.rows = type(self).merge(torch.stack([self.rows.to(new.device), new]))

    def compute(self) -> dict[str, Tensor]:
        """By key: a number for the model, or with ``per_layer`` one for each layer ``[L]``; NaN where it is not known."""
        layers = self._values(self.rows)
        return layers if self.per_layer else self.summary(layers)

    def summary(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One number for the model from those of its layers."""
        return {key: over_layers(layers[key].reshape(-1), reduce) for key, reduce in self.over.items()}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of this class, or its state, has seen."""
        super().merge_state(incoming_state)
        self._computed = None

    def _empty(self) -> Tensor:
        return torch.zeros(self.num_rows, sum(self.num_features), dtype=torch.float64)

    def _measured(self, reading: NormReading) -> Tensor:
        """The state of this one reading."""
        raise NotImplementedError

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        """A number for each layer, by key."""
        raise NotImplementedError

    def _mean(self, values: Tensor) -> Tensor:
        return over_channels(values, self.num_features, torch.mean)


class RunningStatDrift(NormMetric):
    """How far ranks' running statistics have come apart: what each would evaluate with, at this moment.

    Per channel, the largest difference between two ranks of the running mean, and that of the running standard deviation s
    = √(running variance + eps), √((max m - min m)² + (max s - min s)²), in units of s (by the ranks' mean variance). 0 where
    statistics are synchronised, and in one process. Only the latest update of a rank counts.

    Computes ``drift``, the mean over channels, and ``drift_max``, their largest, in σ; over layers again mean and largest.
    """

    full_state_update = True  # an update takes the place of the one before
    num_rows = 6
    over: ClassVar = {"drift": torch.mean, "drift_max": torch.amax}

    @staticmethod
    def merge(parts: Tensor) -> Tensor:
        """Number and sum of variances add up; extremes of mean and standard deviation, of which a rank has or has none."""
        sums, lowest, highest = parts[:, :2].sum(0), parts[:, 2::2].amin(0), parts[:, 3::2].amax(0)
        return torch.stack([*sums, lowest[0], highest[0], lowest[1], highest[1]])

    def update(self, reading: NormReading) -> None:
        self.rows = self._empty()
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
        return torch.where(known > 0, rows, self._empty().to(rows.device))

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        number, var, low_mean, high_mean, low_std, high_std = rows.unbind(0)
        apart = ((high_mean - low_mean).square() + (high_std - low_std).square()).sqrt()
        drift = torch.where(number > 0, apart / (var / number).sqrt(), torch.nan)
        return {"drift": self._mean(drift), "drift_max": over_channels(drift, self.num_features, torch.amax)}


class TrainEvalGap(NormMetric):
    """How far evaluation would be from training: batches against the running statistics that they found.

    Per channel the root mean square difference, over all samples of all ranks since the last reset, between x̂ by the
    statistics of these samples and x̂ by the running ones (their mean over ranks and updates), before scale and shift:
    √((μ - m)² + Var x·(1 - s/σ)²)/s. Running statistics that lag behind the weights show, and data unlike the data before;
    so does, with few samples, chance: about 1/√(number of samples).

    Computes ``gap`` and ``gap_max``, mean and largest over channels, in σ; over layers again mean and largest.
    """

    num_rows = 7
    over: ClassVar = {"gap": torch.mean, "gap_max": torch.amax}

    def __init__(self, norms: nn.Module | NormProbe, *, per_layer: bool = False, **kwargs: Any) -> None:
        probe = norms if isinstance(norms, NormProbe) else NormProbe(norms)
        super().__init__(probe, per_layer=per_layer, **kwargs)
        self._centred = tuple(is_centred(layer) for layer in probe.layers.values())

    def _measured(self, reading: NormReading) -> Tensor:
        known = reading.before[:1]
        return torch.cat([reading.inputs[:3], known, known * reading.before[1:]])

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        moments, running = rows[:3], rows[3:]
        if not all(self._centred):  # moving averages take the mean square about a constant, in training and after
            centred = torch.cat([rows.new_full((n,), c) for n, c in zip(self.num_features, self._centred, strict=True)])
            count, mean, m2 = moments
            centre = running[1] / running[0].clamp(min=1)
            about = torch.stack([count, centre, m2 + count * (mean - centre).square()])
            moments = torch.where(centred > 0, moments, about)
        gap = evaluation_gap(moments, running)
        return {"gap": self._mean(gap), "gap_max": over_channels(gap, self.num_features, torch.amax)}


class EffectiveBatch(NormMetric):
    """How many values share a statistic, and how noisy the statistics of single ranks are.

    ``batch``: values per channel (samples × height × width) behind one statistic, as the layer trains: those of a rank, of a
    ghost, or of all ranks that synchronise. NaN for a layer in evaluation mode. For the model, the smallest.

    ``noise``: the share of the variance that lies between parts, Σ n_p(μ_p - μ)² / Σ (x - μ)², where a part is one call on one
    rank: after one update of each rank, between-rank over total variance. n values drawn at random have about 1/n; more says
    that they are not independent. NaN for a single part. The mean over channels; for the model, the largest.
    """

    num_rows = len(Input)
    over: ClassVar = {"batch": torch.amin, "noise": torch.amax}

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.inputs

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        statistics = torch.where(rows[Input.STATISTICS] > 0, rows[Input.STATISTICS], torch.nan)
        noise = between_share(rows, Input.WITHIN, Input.PARTS)
        return {"batch": self._mean(rows[Input.COUNT] / statistics), "noise": self._mean(noise)}


class DeadChannels(NormMetric):
    """Channels that carry no information any longer, by the mean and standard deviation of a layer's output.

    ``dead``: the output hardly varies (by less than 1e-3), or lies below 0 by three standard deviations, so that a ReLU behind
    it is silent. ``saturated``: it varies, and lies above 0 by three, so that a ReLU does nothing, and a sigmoid little.
    Moments and not extremes, because those of a batch of two say nothing. Shares of a layer's channels; over layers the mean.
    """

    num_rows = 3
    over: ClassVar = {"dead": torch.mean, "saturated": torch.mean}

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.outputs

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        _, mean, var = moments_of(rows)
        std = var.sqrt()
        known = torch.where(std.isnan(), torch.nan, 0.0)
        dead = (std < 1e-3) | (mean + 3 * std <= 0)
        saturated = ~dead & (mean - 3 * std >= 0)
        return {"dead": self._mean(dead + known), "saturated": self._mean(saturated + known)}


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
    over: ClassVar = {"clip_r": torch.mean, "clip_d": torch.mean}

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.clips

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        rates = rows[1:] / torch.where(rows[0] > 0, rows[0], torch.nan)
        return {"clip_r": rates[0], "clip_d": rates[1]}


class ExchangeCost(_LayerMetric):
    """What the exchanges of our synchronised layers cost a rank in a step, forward and backward.

    Computes ``exchanges``, their number; ``exchange_kb``, kilobytes that a rank hands over; ``exchange_ms``, milliseconds in
    them, waiting for slower ranks included; means over updates and ranks, for the model as a whole, also with ``per_layer``.
    On an accelerator the time is the host's, which goes on while the device waits: use a profiler there.
    """

    num_rows = 4
    over: ClassVar = {"exchanges": torch.mean, "exchange_kb": torch.mean, "exchange_ms": torch.mean}

    def _empty(self) -> Tensor:
        return torch.zeros(self.num_rows, 1, dtype=torch.float64)

    def _measured(self, reading: NormReading) -> Tensor:
        return reading.exchanges.unsqueeze(1)

    def _values(self, rows: Tensor) -> dict[str, Tensor]:
        number, num_bytes, seconds = rows[1:] / torch.where(rows[0] > 0, rows[0], torch.nan)
        return {"exchanges": number, "exchange_kb": num_bytes / 1e3, "exchange_ms": seconds * 1e3}


def meet(metrics: Sequence[NormMetric], group: Group) -> None:
    """Merge the states of all ``metrics`` over the ranks of ``group``, in one gather for all of them.

    Their own ``compute`` would take three collectives for each, and still does unless they were made with
    ``sync_on_compute=False``. Every rank must call this, with the same metrics.
    """
    flat = torch.cat([metric.rows.flatten() for metric in metrics])
    columns = gather_rows(flat, group).split([metric.rows.numel() for metric in metrics], dim=1)
    for metric, rows in zip(metrics, columns, strict=True):
        metric.rows = type(metric).merge(rows.view(-1, *metric.rows.shape))
        metric._computed = None
