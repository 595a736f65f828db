"""Which layers the user means: globs on qualified names, types and predicates."""

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import nn

from syncnorm.conversion._layers import Layer, display, walk

__all__ = ["Pattern", "Patterns", "describe", "has_globs", "select"]

Pattern: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns: TypeAlias = Pattern | Sequence[Pattern] | None


def select(
    model: nn.Module, layers: list[Layer], argument: str, patterns: Patterns, others: Sequence[Layer] = ()
) -> dict[int, str]:
    """Layers that ``patterns`` match.

    Args:
        model: Where the layers are.
        layers: All layers that a pattern may mean.
        argument: Name of the argument, for messages.
        patterns: None, a pattern or a sequence of them: a glob for a qualified name (``*`` matches dots too), a module
            type (subclasses included), or a callable ``(name, module) -> bool``.
        others: Layers that only a glob may mean.

    Returns:
        By ``id`` of the module, the pattern that matched it, in words.

    Raises:
        TypeError: If something is not a pattern.
        ValueError: If a pattern matches no layer, though there are layers.
    """
    chosen: dict[int, str] = {}
    for pattern in _listed(argument, patterns):
        asked = [*layers, *others] if isinstance(pattern, str) else layers
        matched = [layer for layer in asked if _matches(pattern, layer)]
        if not matched and asked:
            raise ValueError(_no_match(model, layers, argument, pattern))
        for layer in matched:
            chosen.setdefault(id(layer.module), describe(pattern))
    return chosen


def has_globs(patterns: Patterns) -> bool:
    """Whether there is a glob among ``patterns``, which speaks of layers by name, whatever they are."""
    return any(isinstance(pattern, str) for pattern in _listed("include", patterns))


def describe(pattern: Pattern) -> str:
    """A pattern as a user would write it."""
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", None) or repr(pattern)


def _listed(argument: str, patterns: Patterns) -> list[Pattern]:
    if patterns is None:
        return []
    listed: list[Any] = list(patterns) if isinstance(patterns, list | tuple | set | frozenset) else [patterns]
    if not listed and argument == "include":
        raise ValueError("include is empty, so nothing would be converted. None converts all layers.")
    for pattern in listed:
        if isinstance(pattern, type) and not issubclass(pattern, nn.Module):
            raise TypeError(f"{argument} takes types of modules, got {pattern.__name__}, which is not an nn.Module.")
        if isinstance(pattern, nn.Module) or not (isinstance(pattern, str) or callable(pattern)):
            raise TypeError(
                f"{argument} takes globs on qualified names, module types, callables (name, module) -> bool, or a "
                f"sequence of these; got {type(pattern).__name__}."
            )
    return listed


def _matches(pattern: Pattern, layer: Layer) -> bool:
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(name, pattern) for name in (*layer.names, *layer.short_names))
    if isinstance(pattern, type):
        return isinstance(layer.subject, pattern) or isinstance(layer.module, pattern)
    return any(pattern(name, layer.subject) for name in layer.short_names)


def _no_match(model: nn.Module, layers: list[Layer], argument: str, pattern: Pattern) -> str:
    text = f"{argument}={describe(pattern)} matches no normalisation layer that uses batch statistics."
    if isinstance(pattern, str):
        names = [name for layer in layers for name in layer.short_names]
        inside = [name for name in names if name.startswith(pattern + ".")]
        if inside:
            return f"{text} It names a container; {pattern + '.*'!r} means the {len(inside)} layers in it."
        named = {place.short_name: place.module for place in walk(model)}
        if pattern in named:
            text += f" There, the model has a {type(named[pattern]).__name__}."
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        return f"{text} Close names are {[display(name) for name in close]}; a glob must match the whole name."
    return f"{text} The model has {sorted({type(layer.module).__name__ for layer in layers})}."
