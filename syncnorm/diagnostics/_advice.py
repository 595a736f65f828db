"""What to do about the batch norms of a model: the rules, in one place, and their answer as a report.

The thresholds are those of docs/choosing.md, which says where each comes from; ``tests/test_advise.py`` compares the two.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from syncnorm.conversion._plan import shorten
from syncnorm.conversion._table import Report, Table

__all__ = ["THRESHOLDS", "Action", "Advice", "AdviceRow", "Decision", "Evidence", "decide"]

Action = Literal[
    "leave", "synchronise (node)", "synchronise (world)", "ghost", "batch renorm", "GroupNorm", "freeze"
]  # fmt: skip

THRESHOLDS = {
    "enough": 8.0,
    "slack": 0.9,
    "few": 3.0,
    "maps": 64.0,
    "skewed": 2.0,
    "plenty": 16.0,
    "huge": 2048.0,
    "ghost": 128.0,
    "fit": 0.25,
    "seen": 1000.0,
}
"""What decides, by name; docs/choosing.md has the meaning and the origin of each."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of one layer.

    Attributes:
        samples: Samples in a rank's batch, on average.
        values: Values per channel in it: samples times the size of the map.
        independent: How many independent values would have as noisy a mean; ``values`` where a single batch cannot tell.
        skew: How many times noisier batches' means are than those of samples drawn at random; None where that is not known.
        share: Ranks' batches behind one statistic when the layer trains: the ranks that share it, less than 1 for ghosts.
        gap: How far the layer evaluates from these batches, in standard deviations; None without running statistics.
        seen: Batches that its running statistics have seen.
        fixed: Why it does not use the batch; empty if it does.
        family: ``"batch_norm"`` for torch's, else that of ours.
    """

    samples: float
    values: float
    independent: float
    skew: float | None
    share: float
    gap: float | None
    seen: int
    fixed: str
    family: str


class Decision(NamedTuple):
    """What to do with a layer, why, and the arguments of :func:`syncnorm.convert` that do it."""

    action: Action
    reason: str
    options: dict[str, Any]


def decide(found: Evidence, ranks: int, ranks_per_node: int) -> Decision:
    """The rule.

    Args:
        found: Of the layer.
        ranks: That train together.
        ranks_per_node: Of them, on one machine.
    """
    enough, few, slack = (THRESHOLDS[name] for name in ("enough", "few", "slack"))
    if found.fixed:
        return _leave(found.fixed)
    have, together = found.independent * found.share, found.samples * found.share
    what = f"{_count(have)} independent values per statistic"
    if have >= slack * enough and together >= THRESHOLDS["huge"]:
        size = int(THRESHOLDS["ghost"])
        reason = (
            f"{_count(together)} samples share a statistic; large batches generalise better with the noise of {size}"
        )
        return Decision("ghost", reason, {"to": "ghost_batch_norm", "virtual_batch_size": size})
    if have >= slack * enough:
        # Alone, no other norm did better there.
        if found.values > found.samples and have < slack * THRESHOLDS["maps"] and ranks > found.share:
            reason = f"{what} are enough for vectors; on maps more help, up to {THRESHOLDS['maps']:g}"
            needed = min(_ranks_for(THRESHOLDS["maps"], found), ranks)
            return _synchronise(needed, found, ranks, ranks_per_node, reason) or _leave(reason)
        return _leave(f"{what}; {enough:g} are enough")
    why = f"{what}; {enough:g} are enough"
    skewed = found.skew is not None and found.skew > THRESHOLDS["skewed"]
    if skewed:
        why += f"; batches are not drawn at random, their means are {found.skew:.1f} times as noisy"
    if found.share < 1 and found.independent >= slack * enough:
        size = math.ceil(found.samples * slack * enough / found.independent)
        reason = f"{why}, {size} samples have them"
        return Decision("ghost", reason, {"to": "ghost_batch_norm", "virtual_batch_size": size})
    needed = _ranks_for(enough, found)
    joined = _synchronise(needed, found, ranks, ranks_per_node, f"{why}, {needed} ranks have them")
    if joined is not None:
        return joined
    more = f"; {needed} ranks that synchronise would have them" if 1 < needed <= _MOST_RANKS else ""
    if found.gap is not None and found.gap <= THRESHOLDS["fit"] and found.seen >= THRESHOLDS["seen"]:
        reason = f"{why}; the running statistics of {found.seen} batches fit, so fine-tuning needs no others{more}"
        return Decision("freeze", reason, {"to": "frozen_batch_norm"})
    reach = found.independent * max(ranks, found.share)
    if reach >= slack * few and not skewed and ranks > found.share:
        return Decision("synchronise (world)", f"{why}, all ranks have {_count(reach)}{more}", _sync("world"))
    drawn = reach * (found.skew or 1.0)  # what they would have if they were drawn at random
    if (reach >= slack * few and not skewed) or (skewed and drawn >= slack * THRESHOLDS["plenty"]):
        if found.family == "batch_renorm":
            return _leave(f"{why}; batch renorm is for that{more}")
        return Decision("batch renorm", f"{why}; the running statistics can correct that{more}", {"to": "batch_renorm"})
    return Decision("GroupNorm", f"{why}{more}", {"to": "group_norm"})


def _ranks_for(values: float, found: Evidence) -> int:
    """Ranks whose batches have so many independent values together."""
    return math.ceil(THRESHOLDS["slack"] * values / found.independent) if found.independent else _MOST_RANKS + 1


def _synchronise(needed: int, found: Evidence, ranks: int, ranks_per_node: int, reason: str) -> Decision | None:
    """Over the smallest group that has ``needed`` ranks and is larger than now; None if there is none."""
    if found.share < needed <= ranks_per_node < ranks:
        return Decision("synchronise (node)", reason, _sync("node"))
    return Decision("synchronise (world)", reason, _sync("world")) if found.share < needed <= ranks else None


_MOST_RANKS = 4096  # beyond that nobody is helped by a number


def _leave(reason: str) -> Decision:
    return Decision("leave", reason, {})


def _sync(group: str) -> dict[str, Any]:
    return {"to": "sync_batch_norm", "process_group": group}


@dataclass(frozen=True)
class AdviceRow:
    """One layer: what was measured, what to do, and what that costs.

    Attributes:
        name: Qualified name.
        type: Its class.
        features: Channels.
        samples: Samples in a rank's batch, on average.
        values: Values per statistic as the layer trains now: samples, times the size of the map, times the ranks that share.
        independent: Independent values in a rank's batch, by the noise of its means.
        noise: Of the mean of a rank's batch: between-batch share of the variance; None from a single batch.
        gap: Distance of batches and running statistics, in standard deviations; None without these.
        action: What to do.
        reason: Why.
        options: Arguments of :func:`syncnorm.convert` that do it; empty to leave it.
        exchanges: Collectives of the layer in a training step if that is done.
        num_bytes: Bytes that a rank hands over in them.
    """

    name: str
    type: str
    features: int
    samples: float
    values: float
    independent: float
    noise: float | None
    gap: float | None
    action: Action
    reason: str
    options: dict[str, Any]
    exchanges: int
    num_bytes: int


@dataclass(frozen=True)
class Advice(Report):
    """What :func:`advise` found; true if everything may stay as it is. Prints as a table.

    Attributes:
        rows: One for each batch norm, in the model's order.
        num_batches: Batches that were measured, over all ranks.
        ranks: That train together.
        ranks_per_node: Of them, on one machine.
        notes: What could not be told, and what to keep in mind.
    """

    rows: tuple[AdviceRow, ...]
    num_batches: int
    ranks: int
    ranks_per_node: int
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every layer may be left as it is."""
        return all(row.action == "leave" for row in self.rows)

    @property
    def exchanges(self) -> int:
        """Collectives of a training step, if the advice is taken."""
        return sum(row.exchanges for row in self.rows)

    @property
    def num_bytes(self) -> int:
        """Bytes that a rank hands over in them."""
        return sum(row.num_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON: the fields, ``ok``, ``exchanges``, ``num_bytes`` and ``commands``."""
        totals = {"ok": self.ok, "exchanges": self.exchanges, "num_bytes": self.num_bytes}
        return {**totals, **dataclasses.asdict(self), "commands": self.commands()}

    def commands(self) -> list[str]:
        """Lines of Python that do what is advised, one for each kind of change."""
        kinds: dict[str, list[str]] = {}
        for row in self.rows:
            if row.options:
                options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
                kinds.setdefault(options, []).append(row.name)
        all_alike = [len(names) == len(self.rows) for names in kinds.values()] == [True]
        return [
            f"syncnorm.convert(model, {options}{'' if all_alike else f', include={names}'})"
            for options, names in kinds.items()
        ]

    def parts(self) -> Iterator[str | Table]:
        """What to do, the table, what it costs, how it is done."""
        header = ("layer", "class", "channels", "samples", "values", "independent", "noise", "gap", "do", "because")
        lines = [
            (
                row.name, row.type, str(row.features), _count(row.samples), _count(row.values), _count(row.independent),
                "" if row.noise is None else f"{100 * row.noise:.1f} %", "" if row.gap is None else f"{row.gap:.2f} σ",
                row.action, row.reason,
            )
            for row in self.rows
        ]  # fmt: skip
        over = f"{self.num_batches} batches, {self.ranks} {'rank' if self.ranks == 1 else 'ranks'}"
        actions = dict.fromkeys(row.action for row in self.rows)
        named = {action: [row.name for row in self.rows if row.action == action] for action in actions}
        said = "; ".join(f"{action}: {shorten(names)}" for action, names in named.items())
        yield f"{over}: {said}"
        yield Table(header, lines)
        yield f"cost of a step then: {self.exchanges} exchanges, {self.num_bytes:,} bytes handed over by a rank"
        yield from (f"do: {command}" for command in self.commands())
        yield from (f"note: {note}" for note in self.notes)


def _count(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}".removesuffix(".0")
