"""What a conversion would do, layer by layer with the reason, before anything is done; the conversion follows it."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from syncnorm.conversion._filters import convolutions, judge_convolution
from syncnorm.conversion._fuse import Block, find_fusions
from syncnorm.conversion._fused_forward import takes_in
from syncnorm.conversion._layers import SHARDED, Layer, class_names, display, find_layers, walk
from syncnorm.conversion._replace import STATISTICS
from syncnorm.conversion._select import Patterns, has_globs, select
from syncnorm.conversion._table import Report, Table
from syncnorm.conversion._targets import TARGETS, check_options
from syncnorm.conversion._verdict import Verdict, judge
from syncnorm.errors import SyncNormError

__all__ = ["Entry", "Plan", "plan"]


@dataclass(frozen=True)
class Entry:
    """What happens to one layer.

    Attributes:
        name: Its first qualified name; empty for a model that is itself the layer.
        aliases: Its other names.
        source: Its class.
        target: What it becomes, or stays.
        action: ``"swap"`` (of the class, in place), ``"replace"`` (by another module), ``"keep"`` or ``"skip"``.
        reason: Why, in words.
    """

    name: str
    aliases: tuple[str, ...]
    source: str
    target: str
    action: str
    reason: str
    _layer: Layer = field(repr=False, compare=False)
    _verdict: Verdict = field(repr=False, compare=False)

    @property
    def changes_parameters(self) -> bool:
        """Whether the layer would have parameters that it has not now, or the other way round."""
        return bool({*self._verdict.new, *self._verdict.dropped} - {*STATISTICS})


@dataclass(frozen=True)
class Plan(Report):
    """What :func:`syncnorm.convert` would do; prints as a table.

    Attributes:
        to: The target.
        options: Options of the target that were given.
        entries: One per layer that uses batch statistics, in the model's order; then one per convolution, where those change.
    """

    to: str
    options: dict[str, Any]
    entries: tuple[Entry, ...]
    _blocks: list[Block] = field(default_factory=list, repr=False, compare=False)

    @property
    def counts(self) -> dict[str, int]:
        """Layers per action."""
        counted = Counter(entry.action for entry in self.entries)
        return {action: counted[action] for action in ("swap", "replace", "keep", "skip")}

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON: ``to``, ``options``, and what each entry says."""
        told = ("name", "aliases", "source", "target", "action", "reason")
        entries = [{name: getattr(entry, name) for name in told} for entry in self.entries]
        return {"to": self.to, "options": self.options, "entries": entries}

    def parts(self) -> list[str | Table]:
        """How many layers have which action, and a row for each."""
        counts = (
            ", ".join(f"{number} {action}" for action, number in self.counts.items() if number) or "nothing to convert"
        )
        rows = [
            (
                display(e.name),
                e.source,
                e.action,
                e.target,
                "; ".join([e.reason, *(f"also {alias}" for alias in e.aliases)]),
            )
            for e in self.entries
        ]
        return [f"to {self.to}: {counts}", Table(("layer", "class", "action", "becomes", "reason"), rows)]


def plan(
    model: nn.Module,
    to: str = "sync_batch_norm",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    process_group: object = None,
    strict: bool = False,
    **options: Any,
) -> Plan:
    """Show what :func:`syncnorm.convert` would do with the same arguments. Changes nothing.

    Args:
        model: As for ``convert``.
        to: As for ``convert``.
        include: As for ``convert``.
        exclude: As for ``convert``.
        process_group: As for ``convert``.
        strict: As for ``convert``: raise if a layer would be skipped.
        **options: As for ``convert``.

    Returns:
        A :class:`Plan`; ``print`` it.

    Raises:
        ValueError: For an unknown target, a value out of range, or a pattern that matches nothing.
        TypeError: For an option that the target does not take, or an argument of the wrong type.
        SyncNormError: If a wrapper around the model forbids the change, or with ``strict`` a layer would be skipped.

    Example:
        >>> print(syncnorm.plan(torch.nn.Sequential(torch.nn.BatchNorm1d(64)), to="group_norm"))
        to group_norm: 1 replace
        layer  class        action   becomes                       reason
        0      BatchNorm1d  replace  GroupNorm(64, num_groups=32)  weight and bias carried over; running statistics dropped
    """
    given = {**options} if process_group is None else {"process_group": process_group, **options}
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert and plan take an nn.Module, got {type(model).__name__}.")
    check_options(to, given)
    layers, others = find_layers(model), convolutions(model, given)
    included = select(model, layers, "include", include, others)
    excluded = select(model, layers, "exclude", exclude, others)
    if others and has_globs(include) and not any(id(layer.module) in included for layer in others):
        raise ValueError(
            f"include={include!r} selects no convolution for {' or '.join(TARGETS[to].filters)}: globs are for the names of "
            "convolutions, too. Widen it ('backbone.*'), or leave it out."
        )
    entries = []
    for layer, norm in [*((layer, True) for layer in layers), *((layer, False) for layer in others)]:
        own = type(layer.module).__name__
        if id(layer.module) in excluded:
            verdict = Verdict("keep", own, f"excluded by {excluded[id(layer.module)]}")
        elif id(layer.module) not in included and (include is not None if norm else has_globs(include)):
            verdict = Verdict("keep", own, "not included")
        else:
            verdict = judge(layer, to, given) if norm else judge_convolution(layer, given)
        entries.append(_entry(layer, verdict))
    blocks: list[Block] = []
    if given.get("fuse"):
        entries, blocks = _fused(model, to, entries)
    made = Plan(to, given, tuple(entries), blocks)
    _refuse_wrapped(model, made)
    skipped = [entry for entry in entries if entry.action == "skip"]
    if strict and skipped:
        raise SyncNormError(
            f"strict=True, and {len(skipped)} layers cannot be converted to {to!r}; nothing was changed:\n"
            + skipped_text(skipped)
        )
    return made


def _fused(model: nn.Module, to: str, entries: list[Entry]) -> tuple[list[Entry], list[Block]]:
    """Entries that tell what each norm takes in, and the modules whose code changes for it."""
    takes = {}
    for entry in entries:
        norm, layer = entry._layer.module, entry._verdict.layer
        activates = TARGETS[to].activates and "activates too" in entry.reason
        occupied = getattr(norm, "activation", None) is not None or getattr(norm, "memory_efficient", False)
        if layer is not None and not occupied and (taken := takes_in(layer, activates=activates)) is not None:
            takes[id(norm)] = taken
    found = find_fusions(model, takes)

    def told(entry: Entry) -> Entry:
        norm = id(entry._layer.module)
        if norm not in takes:
            return entry
        what = f"takes in {found.took[norm]}" if norm in found.took else f"not fused: {found.why[norm]}"
        return replace(entry, reason=f"{entry.reason}; {what}")

    return [told(entry) for entry in entries], found.blocks


def _entry(layer: Layer, verdict: Verdict) -> Entry:
    name, *aliases = layer.names
    action, target, reason, *_ = verdict
    return Entry(name, tuple(aliases), type(layer.module).__name__, target, action, reason, layer, verdict)


def skipped_text(skipped: list[Entry]) -> str:
    """Layers left as they are, one line per class and reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for entry in skipped:
        alike.setdefault((entry.source, entry.reason), []).append(display(entry.name))
    return "\n".join(
        f"  {len(names)} × {source} ({shorten(names)}): {reason}." for (source, reason), names in alike.items()
    )


def shorten(names: list[str]) -> str:
    """Names in a row, the first few of many."""
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"… {len(names) - 5} more"])


def _named(entries: list[Entry]) -> str:
    return shorten([display(entry.name) for entry in entries])


def _refuse_wrapped(model: nn.Module, made: Plan) -> None:
    """A wrapper that has taken note of the parameters cannot have them change under it."""
    swapped = [entry for entry in made.entries if entry.action == "swap"]
    trained = [e for e in swapped if any(p.requires_grad for p in e._layer.module.parameters())]
    if made.to == "frozen_batch_norm" and trained and any(_waits_for_all(place.module) for place in walk(model)):
        raise SyncNormError(
            f"to={made.to!r} would take {_named(trained)} out of training, and DistributedDataParallel waits for the gradients "
            "of all parameters that it has taken note of. Convert before wrapping the model; nothing was changed."
        )
    replaced = [entry for entry in made.entries if entry.action == "replace"]
    if not replaced:
        return
    around = set().union(*(class_names(place.module) for place in walk(model)))
    if around & SHARDED:
        raise SyncNormError(
            f"to={made.to!r} puts other modules in place of {_named(replaced)}, and FSDP has sharded the model as it "
            "is. Convert before sharding; nothing was changed."
        )
    changing = [e for e in replaced if e.changes_parameters]
    if changing and "DistributedDataParallel" in around:
        added = sorted({name for e in changing for name in e._verdict.new} - {*STATISTICS})
        taken = sorted({name for e in changing for name in e._verdict.dropped} - {*STATISTICS})
        what = [f"add {', '.join(added)} to"] * bool(added) + [f"take {', '.join(taken)} from"] * bool(taken)
        raise SyncNormError(
            f"to={made.to!r} would {' and '.join(what)} {_named(changing)}, and DistributedDataParallel has taken note of the "
            "parameters there are. Convert before wrapping the model; nothing was changed."
        )
    gone = {
        id(entry._layer.module._buffers[n]) for entry in replaced for n in STATISTICS if n in entry._verdict.dropped
    }
    for place in walk(model):
        if "DistributedDataParallel" in class_names(place.module) and gone >= {id(b) for b in place.module.buffers()}:
            # DDP broadcasts the buffers that it finds before a forward pass, and fails if they have become none.
            raise SyncNormError(
                f"to={made.to!r} would leave no buffer in the model, and DistributedDataParallel has taken note that there "
                "are some. Convert before wrapping the model; nothing was changed."
            )


def _waits_for_all(module: nn.Module) -> bool:
    return "DistributedDataParallel" in class_names(module) and not getattr(module, "find_unused_parameters", False)
