"""The walk that AdaBN and precise batch norm share: a model runs over batches while what its norms are given is measured.

Each norm normalises by the batch, whose statistics are lent to it as running ones: to evaluate by these is to normalise by
the batch, in every norm there is. The model is as it was afterwards; one merge gives every rank the same statistics.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.calibration._layers import Forward, evaluated_by, first_tensor, without_broadcast
from syncnorm.core.features import add_moments
from syncnorm.core.layout import flatten
from syncnorm.core.moments import Moments, empty_moments, merge_moments
from syncnorm.distributed.exchange import exchange_moments
from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.groups import LOCAL, Group
from syncnorm.distributed.ledger import begin_call
from syncnorm.errors import SyncNormError, SyncNormMismatch
from syncnorm.functional._masked_batch_norm import _weights as weights_of_mask
from syncnorm.functional._sync_batch_norm import tell_others
from syncnorm.functional._sync_moments import _weighted_moments as weighted_moments
from syncnorm.functional._walk import moments_of_none
from syncnorm.kernels import choose
from syncnorm.modules import SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["Meeting", "Norm", "Population", "moments_given", "take_population"]

Norm: TypeAlias = _BatchNorm | MixedStatistics
"""A layer that evaluates by running statistics of its input, per channel."""


class Meeting:
    """Where ranks gather rows, of which each that fails refuses exactly one, so that no rank waits for another.

    Args:
        group: The ranks that meet.
    """

    def __init__(self, group: Group) -> None:
        self.group, self._is_over = group, False

    def gather(self, row: Tensor) -> Tensor:
        """:func:`~syncnorm.distributed.gather.gather_rows`; after an error, which all ranks get, nobody meets again."""
        try:
            return gather_rows(row, self.group)
        except SyncNormError:
            self.close()
            raise

    def close(self) -> None:
        """All ranks are about to raise the same error."""
        self._is_over = True

    def refuse(self) -> None:
        """This rank has an error of its own."""
        if not self._is_over:
            send_refusal(0, torch.device("cpu"), self.group)


def take_population(
    caller: str,
    model: nn.Module,
    layers: Mapping[str, Norm],
    batches: Iterable[tuple[Any, bool]],
    forward: Forward,
    meeting: Meeting,
    groups: Mapping[str, Group] | None = None,
) -> int:
    """Replace the running statistics of ``layers`` by those of all values that ``batches`` give them, on all ranks.

    Args:
        caller: The function that a user called.
        model: Whose forward is run, as in evaluation and without gradients.
        layers: Norms with running statistics within it, by name.
        batches: Batches, and whether they count: one that does not makes its rank take part in exchanges, with nothing.
        forward: Calls ``model`` with a batch.
        meeting: Of the ranks whose batches are merged.
        groups: By name, the ranks with which a layer normalises as it does in training: one that is not there by its own
            rank's batch, and moving averages by all that they have been given so far. None: each batch by itself.

    Returns:
        Samples that counted, over all ranks.

    Raises:
        ValueError: If no rank had a sample; if a layer got one value per channel, or values that are not finite. Nothing has
            changed then.
        SyncNormMismatch: If another rank failed. Nothing has changed then.
    """
    population = Population(layers, groups)
    try:
        num_samples = population.measure(model, batches, forward)
    except Exception:
        meeting.refuse()
        raise
    rows = meeting.gather(torch.cat([torch.tensor([float(num_samples)], dtype=torch.float64), *population.rows()]))
    total = int(rows[:, 0].sum())
    if not _write(layers, rows[:, 1:]) and not total:  # of a batch that is an object of its own nobody knows the size
        raise ValueError(f"{caller} needs at least one sample on some rank, got none. Check the loaders' lengths.")
    return total


class Population:
    """The moments of what each layer has been given so far on this rank.

    Args:
        layers: Norms with running statistics, by name.
        groups: As in :func:`take_population`.
        accepts_one_value: Whether a batch of one value per channel, which has no variance, is normalised by the running
            statistics that the layer came with, and no error.
        known: By what layers normalise in place of the batch, by name.
    """

    def __init__(
        self,
        layers: Mapping[str, Norm],
        groups: Mapping[str, Group] | None,
        *,
        accepts_one_value: bool = False,
        known: Mapping[str, Moments] | None = None,
    ) -> None:
        self.layers, self.groups = layers, groups or {}
        self.accepts_one_value, self.known = accepts_one_value, known or {}
        self.found = {name: _none(layer) for name, layer in layers.items()}
        averaging = {name: layer for name, layer in layers.items() if groups is not None and _averages(layer)}
        self.averages = {name: _none(layer) for name, layer in averaging.items()}
        self.counts = True
        self.own: dict[str, dict[str, Tensor | None]] = {}  # the statistics that the layers came with
        self.expected, self.met = list(self.groups), list[str]()  # exchanges of a forward, and those of this one so far

    def rows(self) -> list[Tensor]:
        """``[n, μ, M2]`` of each layer, float64 ``[2C + 1]``."""
        return [torch.cat([m.mean.new_tensor([float(m.count)]), m.mean, m.m2]) for m in self.found.values()]

    def measure(self, model: nn.Module, batches: Iterable[tuple[Any, bool]], forward: Forward) -> int:
        """Run all batches; how many samples counted. The model is as before afterwards."""
        training = [(module, module.training) for module in model.modules()]
        self.own = {
            name: {key: layer._buffers[key] for key in ("running_mean", "running_var") if key in layer._buffers}
            for name, layer in self.layers.items()
        }
        handles: list[Any] = []
        num_samples = 0
        try:
            for module, _ in training:
                module.training = False  # not eval(), which a model may have given another meaning
            for name, layer in self.layers.items():
                handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            # A compiled model runs as it was written: compiled code does not see hooks that came later.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                without_broadcast(model),
            ):
                for batch, self.counts in batches:
                    x = first_tensor(batch)
                    if self.counts and x is not None and x.dim():
                        num_samples += x.size(0)
                    self._forward(model, batch, forward)
        finally:
            for handle in handles:
                handle.remove()
            for name, layer in self.layers.items():
                layer._buffers.update(self.own[name])
            for module, mode in training:
                module.training = mode
        return num_samples

    def _forward(self, model: nn.Module, batch: Any, forward: Forward) -> None:
        self.met = []
        try:
            forward(model, batch)
        except SyncNormMismatch:  # all ranks of an exchange have it
            raise
        except Exception:
            # The others wait in the next exchange, which is known after one batch and until then supposed to be that of the
            # next layer; if there is none, they wait in a meeting.
            for name in self.expected[len(self.met) :][:1]:
                layer, group = self.layers[name], self.groups[name]
                assert layer.running_var is not None
                tell_others(layer.running_var.new_empty(0, layer.num_features), group, layer.num_features, layer)
            raise
        self.expected = self.met

    def _hook(self, name: str) -> Any:
        def measure(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = (args or tuple(kwargs.values()))[0]
            group = self.groups.get(name, LOCAL)
            if x.dim() < 2 or x.size(1) != layer.num_features or not x.is_floating_point():
                return  # the layer itself says what is wrong
            local = moments_given(layer, x, args, kwargs) if self.counts and x.numel() else moments_of_none(x)
            if group.size > 1:
                self.met.append(name)
            call = begin_call(layer, group, x)
            batch = _on_host(exchange_moments(local, group, needs_backward=False, call=call))
            batch = self.known.get(name, batch)
            if batch.count == 1 and self.accepts_one_value:
                layer._buffers.update(self.own[name])
                self.found[name] = add_moments(self.found[name], _on_host(local))
                return
            if batch.count == 1 and name not in self.averages:
                self.expected = []  # all ranks of the exchange raise this
                raise ValueError(
                    f"{name} ({type(layer).__name__}) got one value per channel, {list(x.shape)}, which has no variance. "
                    "Use larger batches, or drop_last=True if it is the last one."
                )
            if not batch.count:
                return  # nothing is measured here, and nobody needs the output
            if name in self.averages:
                batch = self.averages[name] = add_moments(self.averages[name], batch)
            lent = zip(("running_mean", "running_var"), evaluated_by(layer, batch, batch.var), strict=True)
            for key, value in lent:
                if layer._buffers.get(key) is not None:
                    layer._buffers[key] = value.to(layer._buffers[key])
            self.found[name] = add_moments(self.found[name], _on_host(local))

        return measure


def _none(layer: Norm) -> Moments:
    return empty_moments(layer.num_features, torch.device("cpu"))


def _averages(layer: Norm) -> bool:
    """Whether the layer normalises by several batches when it trains."""
    return isinstance(layer, SyncStatistics) and layer.family == "moving_average_batch_norm"


def moments_given(layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
    """Moments of ``x`` [N, C, *] as the norm ``layer`` takes them: by the mask that it was called with, if there is one."""
    mask = kwargs.get("mask", args[2] if len(args) > 2 else None) if isinstance(layer, SyncStatistics) else None
    if mask is not None:
        return weighted_moments(x, weights_of_mask(x, mask))
    return choose("auto", x).batch_moments(flatten(x))


def _on_host(moments: Moments) -> Moments:
    return Moments(float(moments.count), moments.mean.cpu(), moments.m2.cpu())


@torch.no_grad()
def _write(layers: Mapping[str, Norm], rows: Tensor) -> bool:
    """Give each layer the merged moments of its columns, in place; a layer that no rank has called keeps its own.

    Returns:
        Whether any layer was called with values.
    """
    widths = [2 * layer.num_features + 1 for layer in layers.values()]
    merged = []
    for name, columns in zip(layers, rows.split(widths, dim=1), strict=True):
        means, m2s = columns[:, 1:].unflatten(1, (2, -1)).unbind(1)
        moments = merge_moments(Moments(columns[:, 0], means, m2s))
        if not (moments.mean.isfinite() & moments.m2.isfinite()).all():
            raise ValueError(
                f"the inputs of {name} hold NaN or infinite values on some rank, so they have no statistics. Nothing was "
                "changed. Clean the data first."
            )
        merged.append(moments)
    for layer, moments in zip(layers.values(), merged, strict=True):
        if moments.count > 0:
            mean, var = evaluated_by(layer, moments, moments.unbiased_var)
            for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
                if buffer is not None:
                    buffer.copy_(value)
    return any(float(moments.count) > 0 for moments in merged)
