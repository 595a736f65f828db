"""Hooks that are on a model's batch norms for a step, and what they saw: the one source of all metrics of norms.

Nothing stays on the model between steps, so a step that is not looked at costs nothing.
"""

# N batch, C channels of all layers together, L layers

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase
from typing_extensions import Self

from syncnorm.calibration._population import moments_given
from syncnorm.conversion._layers import display, find_layers, keeps_batch_statistics
from syncnorm.conversion._select import Patterns, select
from syncnorm.core.layout import accumulate_dtype
from syncnorm.core.moments import Moments
from syncnorm.diagnostics._exchange_meter import ExchangeMeter
from syncnorm.diagnostics._norm_rows import Array, Input, merge_rows
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.functional._checkpoint import is_recomputing
from syncnorm.functional._walk import moments_of_none
from syncnorm.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["RENORM", "NormProbe", "NormReading", "is_centred", "running_rows"]

RENORM = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


class NormReading(NamedTuple):
    """What one step did to the norms of a model on this rank; rows of float64 in host memory, see :mod:`._norm_rows`.

    Attributes:
        inputs: What layers were given, ``[8, C]`` in the order of :class:`~._norm_rows.Input`.
        outputs: Moments of what they gave, ``[3, C]``.
        before: Running statistics as the step found them, ``[4, C]``: 1 where there are any and else 0, mean, variance, eps.
        after: The same as the step left them.
        clips: Of batch renormalisation ``[3, L]``: 1 for such a layer that trained and else 0, the shares of channels whose
            r and whose d were clipped.
        exchanges: ``[4]``: 1, number, bytes and seconds of the exchanges of our layers.
        turns: What layers were given in their first call, their second, and so on, ``[T, 8, C]``; merged, that is ``inputs``.
    """

    inputs: Tensor
    outputs: Tensor
    before: Tensor
    after: Tensor
    clips: Tensor
    exchanges: Tensor
    turns: Tensor


class NormProbe:
    """Looks at the batch norms of a model while a step runs within it.

        probe = NormProbe(model)
        with probe:
            loss(model(x), y).backward()
        metric.update(probe.reading)

    Measured are batch norms, ours and torch's, ``nn.SyncBatchNorm``, and layers that use batch statistics among others; not
    those of a metric that the model holds. A layer's calls within the block count together; a recompute of activation
    checkpointing is no call. No rank meets another. What ``torch.compile`` made runs within as it was written, since compiled
    code does not see hooks; where it is synchronised, all ranks must look at the same step.

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
            if id(layer.module) not in excluded
            and (include is None or id(layer.module) in included)
            and not layer.metric
        }
        if not self.layers:
            lazy = [name for name, module in model.named_modules() if isinstance(module, _LazyNormBase)]
            if lazy:
                raise ValueError(f"{lazy[0]} is lazy, its channels are not known yet. Run the model once first.")
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
        self._inputs: dict[str, list[_Call]] = {name: [] for name in self.layers}
        self._outputs: dict[str, list[_Call]] = {name: [] for name in self.layers}
        self._before = [_running(layer, clone=True) for layer in self.layers.values()]
        with ExitStack() as stack:
            self._meter = stack.enter_context(ExchangeMeter())
            if "torch._dynamo" in sys.modules:  # else nothing is compiled; the import alone takes seconds
                stack.enter_context(_Eager())
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
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if x is not None and _is_measured(layer, x):
                self._inputs[name].append(_call(layer, x.detach(), args, kwargs, self.per_sample))

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if _is_measured(layer, output):
                self._outputs[name].append(_call(layer, output.detach(), (), {}, False))
                if self._inputs[name]:
                    self._inputs[name][-1].statistics = _num_statistics(layer, output.size(0))

        return before, after

    def _read(self) -> NormReading:
        features, meter, layers = self.num_features, self._meter, list(self.layers.values())
        after = [_running(layer) for layer in layers]
        calls = [*self._inputs.values(), *self._outputs.values()]
        host = _on_host([*(t for of in calls for call in of for t in call.tensors()), *chain(*self._before, *after)])
        clips = torch.zeros(3, len(features), dtype=torch.float64)
        for at, (name, layer) in enumerate(self.layers.items()):
            if isinstance(layer, RENORM) and layer.training and self._inputs[name]:
                clips[0, at], clips[1:, at] = 1.0, layer._clip_rate.cpu()
        cost = [1.0, float(meter.exchanges), float(meter.num_bytes), meter.seconds]
        turns = _call_rows(list(self._inputs.values()), features, host)
        return NormReading(
            inputs=_merged(turns),
            outputs=_merged(_call_rows(list(self._outputs.values()), features, host))[:3],
            before=_running_rows(layers, self._before, features, host),
            after=_running_rows(layers, after, features, host),
            clips=clips,
            exchanges=torch.tensor(cost, dtype=torch.float64),
            turns=turns,
        )


class _Eager:
    """Within, what ``torch.compile`` made runs as it was written; until the last of several, in whatever order they end."""

    open: ClassVar[int] = 0
    stance: ClassVar[Any] = None

    def __enter__(self) -> None:
        if not _Eager.open:
            _Eager.stance = torch.compiler.set_stance("force_eager")
        _Eager.open += 1

    def __exit__(self, *_: object) -> None:
        _Eager.open -= 1
        if not _Eager.open:
            _Eager.stance.__exit__(None, None, None)


@dataclass(slots=True)
class _Call:
    """Moments of what one call was given or gave; the rest is put into rows for all layers at once, later."""

    moments: Moments
    samples: int
    statistics: float = 0.0
    within_samples: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that it holds."""
        return self.moments.mean, self.moments.m2, self.within_samples


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


def _call(layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], per_sample: bool) -> _Call:
    call = _Call(moments_given(layer, x, args, kwargs) if x.numel() else moments_of_none(x), x.size(0))
    size = x.shape[2:].numel()
    if (
        per_sample and x.numel() and size > 1 and call.moments.count == size * x.size(0)
    ):  # masked values count as samples
        means = x.flatten(2).mean(2, dtype=accumulate_dtype(x.dtype)).double()
        between = size * (means - call.moments.mean).square().sum(0)
        call.within_samples = (call.moments.m2 - between).clamp(min=0)
    return call


_Host: TypeAlias = dict[int, Array]
"""Tensors in host memory, by id."""


def _on_host(tensors: list[Tensor | None]) -> _Host:
    """All of them in one transfer, where they are on an accelerator."""
    there = {id(t): t.detach() for t in tensors if t is not None}
    away = [t.double() for t in there.values() if t.device.type != "cpu"]
    if not away:
        return {
            key: (t if t.dtype in (torch.float32, torch.float64) else t.double()).numpy() for key, t in there.items()
        }
    flat = torch.cat([t.to(away[0].device, torch.float64) for t in there.values()]).cpu()
    parts = flat.split([t.numel() for t in there.values()])
    return {key: part.numpy() for key, part in zip(there, parts, strict=True)}


def _call_rows(calls: list[list[_Call]], features: tuple[int, ...], host: _Host) -> Tensor:
    """Calls as rows in the order of :class:`Input`, ``[T, 8, C]``: the first call of each layer, the second, and so on."""
    turns = max(map(len, calls)) or 1
    tables = np.zeros((turns, len(Input), sum(features)))
    for of, columns in zip(calls, _columns(features), strict=True):
        for table, call in zip(tables, of, strict=False):
            mine, count, m2 = table[:, columns], float(call.moments.count), host[id(call.moments.m2)]
            mine[Input.COUNT], mine[Input.MEAN], mine[Input.M2] = count, host[id(call.moments.mean)], m2
            mine[Input.WITHIN], mine[Input.PARTS] = m2, float(count > 0)
            mine[Input.STATISTICS], mine[Input.SAMPLES] = call.statistics, call.samples
            mine[Input.WITHIN_SAMPLES] = 0.0 if call.within_samples is None else host[id(call.within_samples)]
    return torch.from_numpy(tables)


def _merged(turns: Tensor) -> Tensor:
    return turns[0] if len(turns) == 1 else merge_rows(turns)


def _columns(features: tuple[int, ...]) -> Iterator[slice]:
    """Where the channels of each layer are."""
    begin = 0
    for size in features:
        yield slice(begin, begin + size)
        begin += size


def _num_statistics(layer: Any, num_samples: int) -> float:
    """How many statistics this call used, as far as they are this rank's: half of one that it shares with another rank."""
    if not layer.training or getattr(layer, "family", "") == "frozen_batch_norm":
        return 0.0
    ranks = 1
    if isinstance(layer, SyncStatistics | MixedStatistics):
        ranks = max(layer._synced_over, 1) if layer._sync else 1
    elif isinstance(layer, nn.SyncBatchNorm):
        ranks = resolve(group_spec(layer.process_group)).size
    if "virtual_batch_size" in layer.__dict__:
        ghosts = math.ceil(num_samples / layer.virtual_batch_size)
        return 1 / layer._ranks_per_ghost if layer._ranks_per_ghost > 1 else float(ghosts)
    return 1 / ranks if ranks > 1 else float(num_samples > 0)


def running_rows(probe: NormProbe) -> Tensor:
    """The running statistics of now, as :attr:`NormReading.after` has them."""
    layers = list(probe.layers.values())
    now = [_running(layer) for layer in layers]
    return _running_rows(layers, now, probe.num_features, _on_host([*chain(*now)]))


def _running(layer: nn.Module, *, clone: bool = False) -> tuple[Tensor, ...]:
    both = layer._buffers.get("running_mean"), layer._buffers.get("running_var")
    there = tuple(t for t in both if t is not None)
    return () if len(there) < 2 else tuple(t.clone() if clone else t for t in there)


def _running_rows(
    layers: list[nn.Module], statistics: list[tuple[Tensor, ...]], features: tuple[int, ...], host: _Host
) -> Tensor:
    """``[4, C]``: 1 where there are any and else 0, mean, variance, eps."""
    table = np.zeros((4, sum(features)))
    for layer, both, columns in zip(layers, statistics, _columns(features), strict=True):
        table[3, columns] = float(layer.eps)  # type: ignore[arg-type]
        if both:
            table[0, columns], table[1, columns], table[2, columns] = 1.0, *(host[id(t)] for t in both)
    return torch.from_numpy(table)


def is_centred(layer: nn.Module) -> bool:
    """Whether the layer evaluates by a running mean; moving average batch norm does not."""
    return getattr(layer, "family", "") != "moving_average_batch_norm"
