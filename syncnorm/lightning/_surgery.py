"""A conversion that a run makes in one or two goes and takes back at its end: the part that callback and plugin share.

Layers that were synchronised before stay so; the settings that a run gave them are taken back with the rest.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from syncnorm.conversion import convert, plan
from syncnorm.conversion._filters import plain_filters
from syncnorm.conversion._fused_forward import unfuse
from syncnorm.conversion._layers import Layer, display, find_layers
from syncnorm.conversion._targets import STATISTICS_FAMILIES, TARGET_OPTIONS, check_options
from syncnorm.distributed import group_spec, resolve
from syncnorm.modules import SyncStatistics
from syncnorm.modules._swap import SYNC_BATCH_NORMS_OWN

__all__ = ["Surgery"]


class Surgery:
    """What to convert, what was converted, and how to undo it.

    Attributes:
        default_group: Stands for the world where no ``process_group`` was asked for.
        touched: Layers that are converted now.

    Args:
        to: Target of :func:`syncnorm.convert`.
        include: Globs on qualified names; empty for all.
        exclude: Globs on qualified names.
        strict: Raise where a layer would be left with a warning.
        **options: Options of the target; those that are None are not given.

    Raises:
        ValueError: For an unknown target or a value out of range.
        TypeError: For an option that the target does not take, or a pattern that is not a string.
    """

    def __init__(self, to: str, include: Sequence[str], exclude: Sequence[str], strict: bool, **options: Any) -> None:
        self.to, self.strict = to, strict
        self.include, self.exclude = _globs("include", include), _globs("exclude", exclude)
        self.options = {name: value for name, value in options.items() if value is not None}
        check_options(to, self.options)
        self.default_group: object = None
        self.touched: list[nn.Module] = []
        self._undo: list[Callable[[], object]] = []
        self._converted: Counter[tuple[str, str]] = Counter()
        self._skipped: set[str] = set()
        self._already = 0

    @property
    def keeps_keys(self) -> bool:
        """Whether the target has batch norm's state-dict keys and can be taken back; the others are another architecture."""
        return self.to in STATISTICS_FAMILIES

    def pending(self, model: nn.Module) -> list[str]:
        """Names of the layers that :meth:`run` would change now."""
        selection = self._selection(model, last=False)
        if selection is None:
            return []
        entries = plan(model, self.to, **selection, **self._given()).entries
        return [display(entry.name) for entry in entries if entry.action in ("swap", "replace")]

    def run(self, model: nn.Module, *, last: bool) -> None:
        """Convert what is there and selected.

        Args:
            model: Whose layers.
            last: No layers are born after this, so a pattern that matches nothing is an error.
        """
        selection = self._selection(model, last=last)
        if selection is None:
            return
        made = plan(model, self.to, **selection, strict=self.strict, **self._given())
        self._already = sum(e.action == "keep" and self._selects(e._layer) for e in made.entries) - len(self.touched)
        skipped = {display(e.name) for e in made.entries if e.action == "skip"}
        changing = [e for e in made.entries if e.action in ("swap", "replace")]
        if changing or skipped - self._skipped:
            if self.keeps_keys:
                self._undo += [_undo(entry._layer.module) for entry in changing]
                self._undo += [partial(unfuse, block.module) for block in made._blocks]
            with _warnings_on_rank_zero():
                convert(model, self.to, **selection, **self._given())
            self._converted.update((entry.source, entry.target.partition("(")[0]) for entry in changing)
            places = [place for entry in changing for place in entry._layer.places[:1]]
            self.touched += [cast(nn.Module, parent._modules[key]) for parent, key in places]
        self._skipped |= skipped

    def undo(self) -> None:
        """Give every layer its class and settings of before back; nothing if there is nothing to undo."""
        while self._undo:
            self._undo.pop()()
        self.forget()

    def forget(self) -> None:
        """Let the layers stay as they are, and hold them no longer."""
        self.touched, self._undo, self._already, self.default_group = [], [], 0, None
        self._converted, self._skipped = Counter(), set()

    def selected(self, model: nn.Module, modules: list[nn.Module]) -> list[str]:
        """Names of those of ``modules`` that the patterns select in ``model``."""
        wanted = {id(module) for module in modules}
        layers = find_layers(model)
        return [display(layer.names[0]) for layer in layers if id(layer.module) in wanted and self._selects(layer)]

    def found_nothing(self) -> bool:
        """Whether there was no batch norm to convert, skip or keep."""
        return not (self._converted or self._skipped or self._already)

    def summary(self) -> str:
        """One line: what became what, over which ranks, and what was left."""
        done = ", ".join(f"{number} {old} -> {new}" for (old, new), number in self._converted.items()) or "0 converted"
        already = f", {self._already} as they were" if self._already else ""
        return f"{done}{self._ranks()}; {len(self._skipped)} skipped{already}"

    def group_sizes(self) -> tuple[int, int]:
        """Ranks that share statistics, and all ranks. Every rank must call this.

        Raises:
            ValueError: If the world cannot be cut into groups of the asked size.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        return resolve(group_spec(self._given().get("process_group"))).size, world

    def _given(self) -> dict[str, Any]:
        if self.default_group is None or "process_group" not in TARGET_OPTIONS[self.to]:
            return self.options
        return {"process_group": self.default_group, **self.options}

    def _ranks(self) -> str:
        if not self.keeps_keys:
            return ""
        size, world = self.group_sizes()
        if world == 1:
            return " (1 rank: plain batch norm until there are more)" if self.to == "sync_batch_norm" else " (1 rank)"
        return f" ({world} ranks{'' if size == world else f' in groups of {size}'}, {dist.get_backend()})"

    def _selection(self, model: nn.Module, *, last: bool) -> dict[str, Any] | None:
        """Patterns for :func:`plan`; None if no layer that is there so far is meant."""
        layers = find_layers(model)
        include, exclude = self.include, self.exclude
        if not last:
            include = [glob for glob in include if any(_matches(glob, layer) for layer in layers)]
            exclude = [glob for glob in exclude if any(_matches(glob, layer) for layer in layers)]
        if not layers or (self.include and not include):
            return None
        return {"include": include or None, "exclude": exclude or None}

    def _selects(self, layer: Layer) -> bool:
        included = not self.include or any(_matches(glob, layer) for glob in self.include)
        return included and not any(_matches(glob, layer) for glob in self.exclude)


def _globs(argument: str, patterns: Sequence[str]) -> list[str]:
    globs = [patterns] if isinstance(patterns, str) else list(patterns)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(
                f"{argument} takes globs on qualified names here, which a checkpoint and a YAML file can hold; got "
                f"{glob!r}. For types and functions call syncnorm.convert(model, {argument}=...) before the Trainer."
            )
    return globs


def _matches(glob: str, layer: Layer) -> bool:
    return any(fnmatchcase(name, glob) for name in (*layer.names, *layer.short_names))


def _undo(module: nn.Module) -> Callable[[], object]:
    """What brings ``module`` back to how it is now; asked before it is converted."""
    if isinstance(module, SyncStatistics):
        own = {name: vars(module)[name] for name in SYNC_BATCH_NORMS_OWN if name in vars(module)}
        return partial(_adopt_again, module, type(module), module.settings(), own)
    return partial(_release, module)


def _adopt_again(module: nn.Module, layer: type[SyncStatistics], settings: dict[str, Any], own: dict[str, Any]) -> None:
    if isinstance(module, SyncStatistics):  # its user may have reverted it meanwhile
        layer.adopt(module, **settings)
        for name in SYNC_BATCH_NORMS_OWN:
            vars(module).pop(name, None)
        vars(module).update(own)


def _release(module: nn.Module) -> None:
    plain_filters(module)
    if isinstance(module, SyncStatistics):
        module.release()


@contextmanager
def _warnings_on_rank_zero() -> Iterator[None]:
    if not dist.is_initialized() or dist.get_rank() == 0:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
