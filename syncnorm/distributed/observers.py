"""Observers of the collectives of layers on this rank: told of each how many bytes went in and how long it took.

For measurements from above (:class:`syncnorm.diagnostics.ExchangeMeter`); a collective that nobody observes costs nothing more.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Observer", "add_observer", "observed", "remove_observer"]

Observer = Callable[[int, float], None]
_Result = TypeVar("_Result")

_observers: list[Observer] = []


def add_observer(observer: Observer) -> None:
    """Call ``observer(num_bytes, seconds)`` after every collective of a layer on this rank, failed ones included."""
    _observers.append(observer)


def remove_observer(observer: Observer) -> None:
    """Take back one :func:`add_observer`; in any order."""
    _observers.remove(observer)


def observed(row: Tensor, collective: Callable[..., _Result], *arguments: object) -> _Result:
    """``collective(*arguments)``, into which this rank puts ``row``."""
    if not _observers or torch.compiler.is_compiling():
        return collective(*arguments)
    num_bytes, began = row.numel() * row.element_size(), time.perf_counter()
    try:
        return collective(*arguments)
    finally:
        seconds = time.perf_counter() - began
        for observer in _observers:
            observer(num_bytes, seconds)
