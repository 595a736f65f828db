"""Tensors inside whatever a model takes and gives: tuples, dicts, dataclasses and Hugging Face's outputs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["call", "leaves", "map_tensors"]


def call(model: nn.Module, arguments: Any) -> Any:
    """Run ``model`` on a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    if isinstance(arguments, tuple | list):
        return model(*arguments)
    return model(arguments)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``tree`` with its path, such as ``logits`` or ``hidden_states.1``; empty for a bare tensor."""
    if isinstance(tree, Tensor):
        yield name, tree
    for key, child in _children(tree):
        yield from leaves(child, f"{name}.{key}" if name else str(key))


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with every tensor in its tuples, lists and mappings given through ``fn``; other things as they are."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(fn, child) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(fn, child) for child in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(fn, child) for child in tree)
    return tree


def _children(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif isinstance(tree, tuple | list):
        fields = getattr(tree, "_fields", range(len(tree)))
        yield from zip(fields, tree, strict=True)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from ((field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree))
