"""Does this model need synchronised statistics, or another norm? Measured on its own batches, layer by layer.

The model runs as for precise batch norm, in evaluation mode, so that nothing random happens and nothing has to meet; what
ranks saw is merged at the end. A layer that is called several times in a forward has statistics of each of its turns.
"""

# L layers, C channels of all layers together, R ranks, T turns

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from syncnorm.calibration._layers import Forward, call_with_first_tensor, unwrap
from syncnorm.calibration._population import Meeting, Population
from syncnorm.calibration._recalibrate import random_numbers_as_before
from syncnorm.conversion._select import Patterns
from syncnorm.diagnostics._advice import Advice, AdviceRow, Decision, Evidence, decide
from syncnorm.diagnostics._exchange_cost import step_cost
from syncnorm.diagnostics._norm_probe import NormProbe, is_centred, running_rows
from syncnorm.diagnostics._norm_rows import Array, Input, between_share, evaluation_gap, merge_rows, over_channels
from syncnorm.distributed.groups import GroupSpec, _machine_id, group_spec, resolve
from syncnorm.modules import SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["advise"]

_FEW_BATCHES = 8  # with fewer, the noise between them is a guess


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = 32,
    *,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    forward: Forward | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    process_group: object = "world",
) -> Advice:
    """Measure whether batch norms have enough samples behind their statistics, and say for each what to do if not.

    For every layer: how many values share a statistic; how noisy the means of single batches are, the between-batch share of
    the variance; so how many independent values that is (neighbouring pixels are not independent, nor are samples that were
    not drawn at random); and how far its running statistics are from these batches. Of a layer that is called several times
    in a forward, as one that the levels of a pyramid share, each turn is compared with the same turn on other batches. A rule
    with documented thresholds (docs/choosing.md) makes of it one of: leave, synchronise over the ranks of a node or all, a
    ghost batch size, batch renorm, GroupNorm, freeze; with the reason and with what it costs in collectives and bytes per
    step.

    The model runs on the batches without gradients and in evaluation mode, each norm by the statistics of the first eight
    batches together, so that a layer's noise is its own and not that of the layers before it. It is exactly as before
    afterwards: buffers, modes, hooks, random numbers. Call it on all ranks of ``process_group``, which may have different
    numbers of batches (not under FSDP, where forwards meet), or in one process for ranks that are yet to come.

    Args:
        model: Any model; one wrapped in DDP or ``torch.compile`` too.
        batches: What one rank trains on, as large as there and in that order: an iterable, such as a DataLoader, of inputs or
            of tuples or lists that begin with one.
        num_batches: At most so many per rank; None for all. With fewer than 8 the noise is a guess, with 1 it is not known.
        ranks: How many will train together; by default those of ``process_group``.
        ranks_per_node: How many of them on one machine; by default as they are now, or all.
        forward: How the model is called, ``forward(model, batch)``; by default with the input, on its device.
        include: Only these layers; globs, types or predicates, as in :func:`syncnorm.convert`.
        exclude: Leave these out.
        process_group: The ranks that measure, as in :class:`syncnorm.SyncBatchNorm`.

    Returns:
        An :class:`Advice`; ``print`` it.

    Raises:
        ValueError: If the model has no batch norm, no rank has a sample, samples are not finite, or a number is not positive.
            Nothing has changed then.
        TypeError: If a batch is not a tensor and does not begin with one, and ``forward`` is not given.
        SyncNormMismatch: If another rank raised an error over its batches, or has another model.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> [row.action for row in advise(model, torch.randn(64, 2).split(2)).rows]
        ['GroupNorm']
    """
    model = unwrap(model)
    for name, number in (("num_batches", num_batches), ("ranks", ranks), ("ranks_per_node", ranks_per_node)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"advise: {name} must be a whole number of at least 1, or None; got {number!r}.")
    meeting = Meeting(resolve(group_spec(process_group)))
    try:
        probe = NormProbe(model, include, exclude, per_sample=True)
        with random_numbers_as_before(batches):
            found, count = _measure(model, probe, islice(batches, num_batches), forward or call_with_first_tensor)
    except Exception:
        meeting.refuse()
        raise
    head = torch.tensor([float(_machine_id() % 2**40), float(count), float(len(found))], dtype=torch.float64)
    machines, counts, turns = meeting.gather(head).T.tolist()
    mine = torch.cat([_padded(found, int(max(turns))).flatten(), _own_rows(probe).flatten()])
    told = meeting.gather(mine)
    width = sum(probe.num_features)
    seen, own = told[:, : -5 * width].unflatten(1, (-1, len(Input), width)), told[:, -5 * width :].sum(0).view(5, width)
    rows, total = _merge_turns(seen), int(sum(counts))
    if not rows[:, Input.COUNT].any():
        raise ValueError(
            "advise needs at least one batch with samples on some rank, got none. Check the loader's length; an iterator "
            "that has been read is empty."
        )
    sound = rows[:, : Input.M2 + 1].isfinite().all(0).all(0).split(list(probe.num_features))
    if broken := [name for name, values in zip(probe.names, sound, strict=True) if not values.all()]:
        raise ValueError(
            f"advise: the inputs of {broken[0]} hold NaN or infinite values on some rank, so their noise is not known. Clean "
            "the data first."
        )
    ranks = ranks or len(machines)
    here = min(machines.count(machine) for machine in machines) if len(machines) > 1 else ranks
    return _advice(model, probe, rows, own, total, ranks, min(ranks_per_node or here, ranks))


def _measure(model: nn.Module, probe: NormProbe, batches: Iterator[Any], forward: Forward) -> tuple[Tensor, int]:
    """What the layers were given in their first call, their second, ..., ``[T, 8, C]``, and the number of batches."""
    found = torch.zeros(1, len(Input), sum(probe.num_features), dtype=torch.float64)
    count = 0

    def step(model: nn.Module, batch: Any) -> None:
        nonlocal found, count
        with probe:
            forward(model, batch)
        assert probe.reading is not None
        parts = found, probe.reading.turns
        found = _merge_turns(torch.stack([_padded(part, max(map(len, parts))) for part in parts]))
        count += 1

    # To normalise by the batch would hide from the next layer how far its mean is off: what a layer is given must not depend
    # on who else is in the batch. So first a few batches each by itself, and then all of them by what was found.
    first = list(islice(batches, _FEW_BATCHES))
    lending: dict[str, Any] = {n: layer for n, layer in probe.layers.items() if not _why_fixed(layer, model)}
    by_batch = Population(lending, None, accepts_one_value=True)
    by_batch.measure(model, ((batch, True) for batch in first), forward)
    known = {name: moments for name, moments in by_batch.found.items() if moments.count > 1}
    Population(lending, None, known=known).measure(model, ((batch, True) for batch in chain(first, batches)), step)
    return found, count


def _padded(turns: Tensor, length: int) -> Tensor:
    return torch.cat([turns, turns.new_zeros(length - len(turns), *turns.shape[1:])])


def _merge_turns(parts: Tensor) -> Tensor:
    """Each turn of all parts, ``[T, 8, C]`` from ``[R, T, 8, C]``."""
    return torch.stack([merge_rows(of_turn) for of_turn in parts.unbind(1)])


def _advice(
    model: nn.Module, probe: NormProbe, rows: Tensor, own: Tensor, total: int, ranks: int, per_node: int
) -> Advice:
    evidence = _evidence(model, probe, rows, own, ranks, per_node)
    decisions = [decide(found, ranks, per_node) for found, *_ in evidence]
    layers, features = list(probe.layers.values()), probe.num_features
    costs = _costs(features, evidence, decisions, ranks)
    told = zip(probe.names, layers, features, evidence, decisions, costs, strict=True)
    made = tuple(
        AdviceRow(
            name=name, type=type(layer).__name__, features=channels, samples=found.samples,
            values=found.values * found.share, independent=found.independent, noise=noise, gap=found.gap,
            action=decision.action, reason=decision.reason, options=decision.options, exchanges=cost[0], num_bytes=cost[1],
        )
        for name, layer, channels, (found, noise, _), decision, cost in told
    )  # fmt: skip
    notes = []
    if total == 1:
        notes.append("one batch cannot tell how noisy its means are: values count as independent. Give 8 or more")
    elif total < _FEW_BATCHES:
        notes.append(f"{total} batches tell little of the noise between them. Give 8 or more")
    if ranks == 1 and any(row.action != "leave" for row in made):
        notes.append("for several ranks ask again with ranks=…")
    return Advice(made, total, ranks, per_node, tuple(notes))


_Measured: TypeAlias = tuple[Evidence, float | None, int]
"""Of a layer, with the noise of its means and the number of its calls in a forward."""


def _evidence(
    model: nn.Module, probe: NormProbe, rows: Tensor, own: Tensor, ranks: int, per_node: int
) -> list[_Measured]:
    features, turns, running = probe.num_features, rows.numpy(), own.numpy()
    table = turns.sum(0)  # M2 is about the mean of each turn
    num_turns = (turns[:, Input.PARTS] > 0).sum(0)

    def mean(values: Array) -> list[float | None]:
        return [None if math.isnan(value) else value for value in over_channels(values, features)[0].tolist()]

    parts = np.maximum(table[Input.PARTS], 1)
    share = between_share(table, Input.WITHIN, Input.PARTS, num_turns)
    noise = mean(share)
    # That of n values drawn at random is 1/n: the mean of the parts' means takes one degree of freedom, in each turn.
    free = mean(share * parts / np.maximum(parts - num_turns, 1))
    among = mean(between_share(table, Input.WITHIN_SAMPLES, Input.SAMPLES, num_turns))
    values, samples = mean(table[Input.COUNT] / parts), mean(table[Input.SAMPLES] / parts)
    count = np.where(table[Input.COUNT] > 0, table[Input.COUNT], np.nan)
    squares = [np.where(n > 0, n * evaluation_gap(of, running) ** 2, 0) for of in turns for n in of[: Input.MEAN]]
    gaps = mean(np.sqrt(np.sum(squares, 0) / count))
    seen, calls = mean(running[4] / np.maximum(running[0], 1)), mean(num_turns.astype(np.float64))
    evidence = []
    for at, layer in enumerate(probe.layers.values()):
        number, size = values[at] or 0.0, samples[at] or 0.0
        drawn = free[at]
        independent = number if drawn is None else min(number, 1 / max(drawn, 1e-12))
        # Of maps the values within a sample are not independent, and batches are no worse for that.
        skew = None if drawn is None or not among[at] else drawn * size / (among[at] or 1.0)
        found = Evidence(
            samples=size,
            values=number,
            independent=independent,
            skew=skew,
            share=_share(layer, size, ranks, per_node),
            gap=gaps[at] if is_centred(layer) else None,
            seen=int(seen[at] or 0),
            fixed=_why_fixed(layer, model) or ("" if number else "no sample reached it"),
            family=getattr(layer, "family", "batch_norm"),
        )
        evidence.append((found, noise[at], int(calls[at] or 0)))
    return evidence


def _why_fixed(layer: Any, model: nn.Module) -> str:
    family = getattr(layer, "family", "")
    if family == "frozen_batch_norm":
        return "its statistics are frozen"
    if family == "moving_average_batch_norm":
        return "it normalises by the last batches together"
    if isinstance(layer, MixedStatistics):
        return "its batch statistics are one part among others"
    if not layer.training and getattr(model, "_orig_mod", model).training:
        return "it is in evaluation mode while the model trains"
    return ""


def _share(layer: Any, samples: float, ranks: int, per_node: int) -> float:
    """Ranks' batches behind one statistic when the layer, as it is, trains on so many ranks."""
    spec = GroupSpec("outside")
    if isinstance(layer, SyncStatistics) and layer._sync:
        spec = layer._group_spec
    elif isinstance(layer, nn.SyncBatchNorm):
        spec = group_spec(layer.process_group)
    sizes = {"world": ranks, "node": per_node, "size": min(spec.size, ranks), "named": len(spec.ranks), "outside": 1}
    size = sizes[spec.kind]
    ghost = getattr(layer, "virtual_batch_size", None)
    return float(size) if ghost is None else min(ghost / max(samples, 1.0), float(size))


def _own_rows(probe: NormProbe) -> Tensor:
    """Running statistics ``[4, C]``, and a row with the number of batches that they have seen."""
    rows = running_rows(probe)
    counters = [layer._buffers.get("num_batches_tracked") for layer in probe.layers.values()]
    seen = torch.tensor([0.0 if counter is None else float(counter) for counter in counters], dtype=torch.float64)
    return torch.cat([rows, rows[:1] * seen.repeat_interleave(torch.tensor(probe.num_features))])


def _costs(
    features: tuple[int, ...], evidence: list[_Measured], decisions: list[Decision], ranks: int
) -> list[tuple[int, int]]:
    """Exchanges and bytes of each layer in a step, if the decisions are taken."""
    costs = [(0, 0)] * len(features)
    circles: dict[str, list[tuple[int, list[int]]]] = {}
    for at, ((found, _, calls), decision) in enumerate(zip(evidence, decisions, strict=True)):
        forward, backward = 2 * features[at] + 1, 2 * features[at]
        circle = str(decision.options.get("process_group", "world"))
        if decision.action == "leave":
            met = found.share > 1 and found.family != "frozen_batch_norm"
            words = [forward, backward] if met else []
            if found.family == "ghost_batch_norm" and ranks > 1:
                words.append(forward)  # for the running statistics
        elif decision.action in ("freeze", "GroupNorm") or ranks == 1:
            words = []
        else:
            words = [forward] if decision.action == "ghost" else [forward, backward]
        if words:
            circles.setdefault(circle, []).append((at, words * calls))
    for members in circles.values():
        for (at, _), cost in zip(members, step_cost([words for _, words in members]), strict=True):
            costs[at] = cost
    return costs
