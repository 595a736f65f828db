"""Hooks that are on a model's batch norms for a step, and what they saw: the one source of all metrics of norms.

Nothing stays on the model between steps, so a step that is not looked at costs nothing.
"""

# N batch, C channels of all layers together, L layers

import math
import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from syncnorm.calibration._population import moments_given
from syncnorm.conversion._layers import display, find_layers, keeps_batch_statistics
from syncnorm.conversion._select import Patterns, select
from syncnorm.core.layout import accumulate_dtype, flatten
from syncnorm.diagnostics._exchange_meter import ExchangeMeter
from syncnorm.diagnostics._norm_rows import Input, merge_rows, rows_of
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.functional._checkpoint import is_recomputing
from syncnorm.functional._walk import moments_of_none
from syncnorm.kernels import choose
from syncnorm.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["NormProbe", "NormReading", "is_centred", "running_rows"]

_RENORM = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


class NormReading(NamedTuple):
    """What one step did to the norms of a model on this rank; rows of float64, see :mod:`._norm_rows`.

    Attributes:
        inputs: What layers were given, ``[8, C]`` in the order of :class:`~._norm_rows.Input`.
        outputs: Moments of what they gave, ``[3, C]``.
        before: Running statistics as the step found them, ``[4, C]``: 1 where there are any and else 0, mean, variance, eps.
        after: The same as the step left them.
        clips: Of batch renormalisation ``[3, L]``: 1 for such a layer that trained and else 0, the shares of channels whose
            r and whose d were clipped.
        exchanges: ``[4]``: 1, number, bytes and seconds of the exchanges of our layers.
    """

    inputs: Tensor
    outputs: Tensor
    before: Tensor
    after: Tensor
    clips: Tensor
    exchanges: Tensor


class NormProbe:
    """Looks at the batch norms of a model while a step runs within it.

        probe = NormProbe(model)
        with probe:
            loss(model(x), y).backward()
        metric.update(probe.reading)

    Measured are batch norms, ours and torch's, ``nn.SyncBatchNorm``, and layers that use batch statistics among others.
    A layer's calls within the block count together; a recompute of activation checkpointing is no call. What
    ``torch.compile`` made runs within as it was written, since compiled code does not see hooks. No rank meets another.

    Args:
        model: Any model, wrapped or not.
        include: Only these layers; globs, types or predicates, as in :func:`syncnorm.convert`.
        exclude: Leave these out.
        per_sample: Measure the spread within samples, too: one more pass over each input that is a map.

    Attributes:
        layers: The layers by name.
        reading: Of the last block that ended without an error; None before.

    Raises:
        ValueError: If there is no such layer, or a pattern matches none.
    """

    reading: NormReading | None = None

    def __init__(
        self, model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, per_sample: bool = False
    ) -> None:
        found = find_layers(model, _is_measurable)
        included, excluded = select(model, found, "include", include), select(model, found, "exclude", exclude)
        self.layers: dict[str, nn.Module] = {
            display(layer.short_names[0]): layer.module
            for layer in found
            if id(layer.module) not in excluded and (include is None or id(layer.module) in included)
        }
        if not self.layers:
            raise ValueError(
                "there is no batch norm to look at. Norms of single samples (GroupNorm, LayerNorm, ...) have no statistics of "
                "a batch; see print(syncnorm.inspect(model))."
            )
        self.per_sample = per_sample
        self._stack = ExitStack()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers."""
        return tuple(self.layers)

    @property
    def num_features(self) -> tuple[int, ...]:
        """Channels of each layer."""
        return tuple(int(layer.num_features) for layer in self.layers.values())  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._before = [running_rows(layer) for layer in self.layers.values()]
        with ExitStack() as stack:
            self._meter = stack.enter_context(ExchangeMeter())
            if "torch._dynamo" in sys.modules:  # else nothing is compiled; the import alone takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, layer in self.layers.items():
                before, after = self._hooks(name)
                # First in line: others may lend the layer statistics.
                stack.callback(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is None:
            self.reading = self._read()

    def close(self) -> None:
        """Take the hooks away, as the end of the block does; for who is not told of it."""
        self._stack.close()

    def _hooks(self, name: str) -> tuple[Any, Any]:
        @torch.no_grad()
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if x is not None and _is_measured(layer, x):
                self._inputs[name].append(_input_rows(layer, x, args, kwargs, self.per_sample))

        @torch.no_grad()
        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if _is_measured(layer, output):
                moments = choose("auto", output).batch_moments(flatten(output)) if output.numel() else None
                self._outputs[name].append(rows_of(moments or moments_of_none(output)))
                if self._inputs[name]:
                    row = self._inputs[name][-1]
                    row[Input.STATISTICS] = _num_statistics(layer, output.size(0))

        return before, after

    def _read(self) -> NormReading:
        device = self._before[0].device
        layers = list(self.layers.values())
        clips = [
            torch.cat([layer._clip_rate.new_ones(1), layer._clip_rate]).to(device)
            if isinstance(layer, _RENORM) and layer.training and self._inputs[name]
            else torch.zeros(3, dtype=torch.float64, device=device)
            for name, layer in self.layers.items()
        ]
        meter = self._meter
        cost = [1.0, float(meter.exchanges), float(meter.num_bytes), meter.seconds]
        return NormReading(
            inputs=_side_by_side(self._inputs, self.num_features, len(Input), device),
            outputs=_side_by_side(self._outputs, self.num_features, 3, device),
            before=torch.cat([rows.to(device) for rows in self._before], 1),
            after=torch.cat([running_rows(layer).to(device) for layer in layers], 1),
            clips=torch.stack(clips, 1),
            exchanges=torch.tensor(cost, dtype=torch.float64, device=device),
        )


def _is_measurable(module: nn.Module) -> bool:
    if not keeps_batch_statistics(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    features = getattr(module, "num_features", 0)
    return isinstance(features, int) and features > 0  # a lazy layer has none yet


def _is_measured(layer: Any, x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dim() > 1
        and x.size(1) == layer.num_features
        and x.is_floating_point()
        and not is_recomputing()
        and not torch._C._are_functorch_transforms_active()
    )


def _input_rows(layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], per_sample: bool) -> Tensor:
    x = x.detach()
    moments = moments_given(layer, x, args, kwargs) if x.numel() else moments_of_none(x)
    rows = moments.mean.new_zeros(len(Input), moments.mean.numel())
    rows[:3] = rows_of(moments)
    rows[Input.WITHIN] = moments.m2
    rows[Input.PARTS] = rows[Input.COUNT].sign()
    if per_sample and x.numel():
        rows[Input.SAMPLES] = x.size(0)
        size = x[0, 0].numel()
        if size > 1 and moments.count == size * x.size(0):  # under a mask, values count as samples
            means = x.flatten(2).mean(2, dtype=accumulate_dtype(x.dtype)).double()
            between = size * (means - moments.mean).square().sum(0)
            rows[Input.WITHIN_SAMPLES] = (moments.m2 - between).clamp(min=0)
    return rows


def _num_statistics(layer: Any, num_samples: int) -> float:
    """How many statistics this call used, as far as they are this rank's: half of one that it shares with another rank."""
    if not layer.training or getattr(layer, "family", "") == "frozen_batch_norm":
        return 0.0
    ranks = 1
    if isinstance(layer, SyncStatistics | MixedStatistics):
        ranks = max(layer._synced_over, 1) if layer._sync else 1
    elif isinstance(layer, nn.SyncBatchNorm):
        ranks = resolve(group_spec(layer.process_group)).size
    if hasattr(layer, "virtual_batch_size"):
        ghosts = math.ceil(num_samples / layer.virtual_batch_size)
        return 1 / layer._ranks_per_ghost if layer._ranks_per_ghost > 1 else float(ghosts)
    return 1 / ranks if ranks > 1 else float(num_samples > 0)


def running_rows(layer: Any) -> Tensor:
    """Running statistics as ``[4, C]``: 1 where there are any and else 0, mean, variance, eps."""
    mean, var = layer._buffers.get("running_mean"), layer._buffers.get("running_var")
    own = next((t for t in (mean, var, *layer._parameters.values()) if t is not None), None)
    rows = torch.zeros(4, layer.num_features, dtype=torch.float64, device=None if own is None else own.device)
    rows[3] = getattr(layer, "eps", 0.0)
    if mean is not None and var is not None:
        rows[0], rows[1], rows[2] = 1.0, mean, var
    return rows


def is_centred(layer: nn.Module) -> bool:
    """Whether the layer evaluates by a running mean; moving average batch norm does not."""
    return getattr(layer, "family", "") != "moving_average_batch_norm"


def _side_by_side(
    calls: dict[str, list[Tensor]], num_features: tuple[int, ...], num_rows: int, device: torch.device
) -> Tensor:
    parts = []
    for rows, features in zip(calls.values(), num_features, strict=True):
        if len(rows) == 1:
            parts.append(rows[0].to(device))
        elif rows:
            parts.append(merge_rows(torch.stack(rows)).to(device))
        else:
            parts.append(torch.zeros(num_rows, features, dtype=torch.float64, device=device))
    return torch.cat(parts, 1)
