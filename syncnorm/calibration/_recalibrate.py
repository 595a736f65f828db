"""Precise batch norm: running statistics that are those of the data under the weights of now, over all ranks.

An exponential average lags behind the weights and remembers a handful of batches. Here the weights stand still while the
moments of all batches of all ranks are merged. Ranks stay in step only where layers normalise together; elsewhere they
meet once, at the end.
"""

import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from syncnorm.calibration._layers import Forward, batch_norms, call_with_first_tensor, unwrap
from syncnorm.calibration._population import Meeting, Norm, take_population
from syncnorm.distributed.collectives import group_ranks
from syncnorm.distributed.groups import Group, group_spec, resolve
from syncnorm.modules import BatchNormLSTM, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics
from syncnorm.modules._sharded import is_sharded

__all__ = ["FROZEN", "measured_norms", "random_numbers_as_before", "recalibrate"]

FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    *,
    forward: Forward | None = None,
    process_group: object = "world",
) -> int:
    """Replace running statistics by those of ``batches`` under the weights of now, over all ranks (precise batch norm).

    After training, before an evaluation, or on a copy with averaged weights (``AveragedModel``, EMA, SWA), whose own
    statistics belong to no weights at all. The model runs as in evaluation, so without dropout, and without gradients; each
    norm normalises by the batch while its inputs are measured. Running mean and unbiased running variance become those of
    all values of all batches of all ranks, each counted once, merged in float64, the same bits on every rank. In place on
    the buffers; all else is as before, even if an error is raised: ``num_batches_tracked`` (a counter of training, which
    batch renorm's and moving averages' schedules read), momentum, training flags, hooks, gradients, random numbers.

    What normalises by what: ours and ``nn.SyncBatchNorm`` by the batch of all ranks of their group; ``nn.BatchNorm*``, and
    layers within :func:`syncnorm.disabled`, by their rank's batch. BatchRenorm as with r = 1, d = 0, which is batch norm.
    Ghost batch norm by the whole batch of its group, as evaluation knows no ghosts. Moving average batch norm by all that
    it has been given so far; its second moment is measured, its running mean stays. SwitchableNorm, BatchInstanceNorm
    and EvoNormB0 have their batch statistics measured. A mask says which values count. A layer that is called several times
    pools its calls; one that is not called keeps its statistics.

    What is left: FrozenBatchNorm, ``track_running_stats=False``, a layer in evaluation mode within a model in training mode
    (its owner wants it fixed), and BatchNormLSTM, whose statistics are per time step.

    Ranks may have different numbers of batches. Where layers normalise together, or under FSDP, ranks agree before each
    batch who has one, in one small gather, and a rank that has run out repeats its last batch and counts nothing; there
    every rank needs one batch. Otherwise the only meeting is at the end, and a rank may have none.

    Args:
        model: Any model; one wrapped in DDP, ``AveragedModel`` or ``torch.compile`` too.
        batches: An iterable, such as a DataLoader, of inputs or of tuples or lists that begin with one. Large, mixed batches
            are best: of all but the first norm, inputs depend on how samples are divided.
        num_batches: How many to use on this rank; None for all there are. The paper uses 200 of training size.
        forward: How the model is called, ``forward(model, batch)``; by default with the input, on its device.
        process_group: The ranks whose batches are merged, as in :class:`syncnorm.SyncBatchNorm`. Every one of them must call
            this, and layers must not normalise with any other.

    Returns:
        Number of samples, over all ranks: the sum of the sizes of dim 0 of each batch's first tensor, in
            tuples, lists, mappings and dataclasses; a batch that is another object counts as none.

    Raises:
        ValueError: If there are fewer than ``num_batches``, no rank has a sample, or a rank has none where layers normalise
            together; if the model has no norm to measure, or one whose group is no part of ``process_group``; if a layer
            gets one value per channel, or samples that are not finite. Nothing has changed then.
        TypeError: If a batch is not a tensor and does not begin with one, and ``forward`` is not given.
        SyncNormMismatch: If another rank raised an error. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> recalibrate(model, torch.randn(100, 2).split(25), num_batches=3)
        75

    Reference: Wu & Johnson (2021), arXiv:2105.07576, section 3.
    """
    model = unwrap(model)
    meeting = Meeting(resolve(group_spec(process_group)))
    try:
        layers = measured_norms(model)
        groups = _groups(layers, meeting.group)
    except Exception:
        meeting.refuse()
        raise
    chosen = _counted(batches, num_batches)
    together = meeting.group.size > 1 and (any(g.size > 1 for g in groups.values()) or _is_sharded(model))
    steps = _in_step(chosen, meeting) if together else ((batch, True) for batch in chosen)
    with random_numbers_as_before(batches):
        return take_population(
            "recalibrate", model, layers, steps, forward or call_with_first_tensor, meeting, groups=groups
        )


def measured_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms whose running statistics a training step would move, by name; in a model in evaluation mode, all it has.

    Raises:
        ValueError: If there are none.
    """
    layers: dict[str, Norm] = {**batch_norms(model)}
    layers |= {name: module for name, module in model.named_modules() if isinstance(module, MixedStatistics)}
    tracking = {n: layer for n, layer in layers.items() if layer.running_var is not None and layer.track_running_stats}
    trains = getattr(model, "_orig_mod", model).training  # of what torch.compile wraps
    chosen = {
        name: layer
        for name, layer in tracking.items()
        if not isinstance(layer, FROZEN) and (layer.training or not trains)
    }
    recurrent = [name for name, module in model.named_modules() if isinstance(module, BatchNormLSTM)]
    if not chosen:
        left = [*layers, *recurrent]
        what = f"all it has are left as they are: {left[:6]}{' …' if len(left) > 6 else ''}" if left else "it has none"
        raise ValueError(
            f"recalibrate needs a model with batch norms whose running statistics may move, and {what}. Frozen ones, those "
            "with track_running_stats=False, those in eval() within a model in train(), and BatchNormLSTM are left."
        )
    if recurrent:
        warnings.warn(
            f"recalibrate leaves {recurrent}: the statistics of BatchNormLSTM are per time step and are not measured.",
            stacklevel=3,
        )
    return chosen


def _groups(layers: dict[str, Norm], whole: Group) -> dict[str, Group]:
    """With which ranks each layer normalises, where it is not alone."""
    groups = {name: made for name, layer in layers.items() if (made := _group_of(layer)) is not None and made.size > 1}
    ranks = set(group_ranks(whole.name))
    for name, made in groups.items():
        if not ranks.issuperset(group_ranks(made.name)):
            raise ValueError(
                f"recalibrate needs all ranks that {name} normalises with, {list(group_ranks(made.name))}, and its "
                f"process_group has {sorted(ranks)}. Give it a group that contains them, or none for all ranks."
            )
    return groups


def _group_of(layer: Norm) -> Group | None:
    if isinstance(layer, (SyncStatistics, MixedStatistics)):
        return resolve(layer._group_spec) if layer._sync else None
    return resolve(group_spec(layer.process_group)) if isinstance(layer, nn.SyncBatchNorm) else None


def _is_sharded(model: nn.Module) -> bool:
    """Whether forwards meet, to gather parameters."""
    return any(is_sharded(type(m)) or type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


def _counted(batches: Iterable[Any], num_batches: int | None) -> Iterator[Any]:
    """``num_batches`` of them, or an error: before the first where the length is known, and after the last where not."""
    if num_batches is None:
        yield from batches
        return
    if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
        raise ValueError(f"num_batches is a number of batches, at least 1, or None for all; got {num_batches!r}.")
    found = _length(batches)
    if found is None or found >= num_batches:
        found = 0
        for batch in islice(batches, num_batches):
            found += 1
            yield batch
    if found < num_batches:
        raise ValueError(
            f"recalibrate was asked for num_batches={num_batches}, and there are {found} on this rank. Nothing was changed. "
            "Ask for fewer, or for all of them with num_batches=None."
        )


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):  # as a DataLoader over an iterable dataset
        return None


def _in_step(batches: Iterator[Any], meeting: Meeting) -> Iterator[tuple[Any, bool]]:
    """This rank's batches, and then its last one again, not to count, for as long as another rank has one."""
    end = object()
    last: Any = end
    while True:
        batch = next(batches, end)
        have = meeting.gather(torch.tensor([float(batch is not end)], dtype=torch.float64))[:, 0].bool()
        if not have.any():
            return
        if last is end and not have.all():
            meeting.close()
            without = [
                rank for rank, has in zip(group_ranks(meeting.group.name), have.tolist(), strict=True) if not has
            ]
            raise ValueError(
                f"recalibrate needs a batch on every rank, as layers normalise over ranks, and ranks {without} have none. "
                "Nothing was changed. Give each rank data, or wrap the call in syncnorm.disabled(model)."
            )
        last = last if batch is end else batch
        yield last, batch is not end


@contextmanager
def random_numbers_as_before(batches: Iterable[Any]) -> Iterator[None]:
    """A loader that shuffles, a dataset that augments and a model that samples leave no trace in what comes after."""
    sampler, nested = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    owners = (batches, sampler, nested, getattr(nested, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    generators = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    numpy: Any = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for generator, state in generators:
            generator.set_state(state)
