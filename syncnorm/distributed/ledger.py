"""What a rank remembers of the ranks that it meets: how wide their rows are, which layers have met, and the calls of those.

All rows of a group have one width, so that rows of two layers never meet with two lengths: gloo ends a healthy process there,
or leaves stale bytes.
"""

import os
import zlib
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from syncnorm._version import __version__
from syncnorm.distributed.collectives import find_group, group_position, group_ranks
from syncnorm.distributed.groups import Group
from syncnorm.distributed.processes import refuse_fork

__all__ = [
    "NUM_WORDS",
    "Call",
    "Ledger",
    "begin_anew",
    "begin_call",
    "check_level",
    "ledger_of",
    "note_change",
    "set_check",
    "unsettled",
]

LEVELS = ("off", "inline", "full")

NUM_WORDS = 6  # at the end of a row: see agreement
_FIRST_WIDTH = 256
_LARGEST_WIDTH = 4224  # 2·2048 + 1 and the words, in steps of 128
_STEP = 128

_level: str | None = None

# Names of groups whose ranks have yet to tell each other of a set_check or set_exchange.
unsettled: set[str] = set()


def set_check(level: str) -> None:
    """Choose how much the ranks compare at every exchange of a synchronised layer; on all ranks alike.

    A rank that alone chooses another level than before is an error on all of them at the next exchange (``"off"`` cannot tell).

    Args:
        level: ``"inline"``, the default: layer, direction, call, channels and dtype, within the row that is exchanged
            anyway. ``"full"``: also the settings of the layer, such as eps and momentum. ``"off"``: only whether a backward
            follows; rows are as short as they can be, and ranks at different places are not noticed. At first it is what the
            environment variable ``SYNCNORM_CHECK`` says.

    Raises:
        ValueError: For another level.
    """
    global _level
    if level not in LEVELS:
        raise ValueError(f"the check level must be one of {list(LEVELS)}, got {level!r}.")
    changes, _level = _level not in (None, level), level
    if changes:
        note_change()


def note_change() -> None:
    """What all ranks are to set alike has been set otherwise: at the next exchange of each group its ranks say so."""
    unsettled.update(live.group_name for live in _LEDGERS)


def check_level() -> str:
    """The level of :func:`set_check`."""
    if _level is None:
        set_check(os.environ.get("SYNCNORM_CHECK") or "inline")
    assert _level is not None
    return _level


class Call:
    """One forward call of a layer, as ranks compare it; its backward passes carry it on.

    Attributes:
        layer: Its name, or how the errors of ranks tell it apart; empty for a call of a function.
        turn: How often the layer has been called on this rank.
        number: Exchanges that the group had made when it began, the same on all ranks.
        first: The exchange at which the layer first met: tells layers of two models apart that share a name.
    """

    __slots__ = ("_hash", "channels", "dtype", "first", "layer", "number", "settings", "turn")

    def __init__(
        self,
        layer: str,
        turn: int,
        number: int,
        channels: int,
        dtype: torch.dtype | None,
        settings: str = "",
        first: int = 0,
    ) -> None:
        self.layer, self.turn, self.number, self.first = layer, turn, number, first
        self.channels, self.dtype, self.settings = channels, dtype, settings
        self._hash: int | None = None

    def hashes(self, direction: str, n: int) -> tuple[float, float, float, float]:
        """The place of this rank in two words of 16 bits, each beside its square; ``n`` words are exchanged there."""
        if self._hash is None:
            text = f"{__version__}|{self.layer}|{self.first}|{self.channels}|{self.dtype}|{self.settings}"
            self._hash = zlib.crc32(text.encode())
        crc = zlib.crc32(f"{direction}|{self.number}|{n}".encode(), self._hash)
        low, high = float(crc & 0xFFFF), float(crc >> 16)
        return low, low * low, high, high * high

    def place(self, direction: str) -> str:
        """Where this rank is, for an error."""
        if not self.layer and self.dtype is None:
            return f"a {direction}"
        what = f"{self.layer} call {self.turn}" if self.layer else "a call of a function"
        return f"{what} {direction} C={self.channels} {str(self.dtype).removeprefix('torch.')}"

    def more(self, words: int) -> str:
        """What else ranks compare, for an error where their places look alike."""
        met = f"a layer that first met at exchange #{self.first}" if self.first else ""
        parts = [
            self.settings,
            met,
            f"a row of {words} words",
            f"after {self.number} exchanges",
            f"syncnorm {__version__}",
        ]
        return ", ".join(part for part in parts if part)


class Ledger:
    """What a rank remembers of one live group."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.pid = rank, os.getpid()
        self.width = _FIRST_WIDTH
        self.exchanges = 0
        self.layers: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()  # first exchange, forward calls
        self.failed: set[int] = set()  # exchanges; who first met at one of these, alone, did not
        self.deferred: deque[tuple[Tensor, Any, str, int]] = deque()
        self.settings: tuple[str, str] | None = None  # that its ranks know to be the same on all: exchange, check

    def fits(self, n: int) -> bool:
        """Whether a row has room for ``n`` words beside those that ranks agree by."""
        return n + NUM_WORDS <= self.width

    def grow(self, n: int) -> bool:
        """Make rows long enough for ``n`` words, as all ranks do now; False if that would make all others too long."""
        if n + NUM_WORDS > _LARGEST_WIDTH:
            return False
        self.width = -(-(n + NUM_WORDS) // _STEP) * _STEP
        return True


_LEDGERS: WeakKeyDictionary[Any, Ledger] = WeakKeyDictionary()


def ledger_of(group: Group) -> Ledger:
    """The ledger of this rank for ``group``, of more than one rank.

    Raises:
        SyncNormError: In a fork of the process that is the rank.
    """
    live = find_group(group.name)
    ledger = _LEDGERS.get(live)
    if ledger is None:
        ledger = _LEDGERS[live] = Ledger(group_ranks(group.name)[group_position(group.name)])
    refuse_fork(ledger.pid, ledger.rank)
    return ledger


def begin_anew(group: Group) -> None:
    """Forget what has met over ``group``; all its ranks call this together, and none of its layers is in a step."""
    if group.size > 1:
        _LEDGERS.pop(find_group(group.name), None)


def begin_call(site: object, group: Group, x: Tensor) -> Call | None:
    """The call that a forward over ``group`` begins; None where nothing is compared.

    Args:
        site: The layer. Its name in the model is what :func:`syncnorm.convert` noted; without one, and where two models share
            names, layers are told apart by when they first met.
        group: The ranks that meet.
        x: The input ``[N, C, *]``.
    """
    if group.size == 1 or torch.compiler.is_compiling() or check_level() == "off":
        return None
    ledger = ledger_of(group)
    channels = x.size(1) if x.dim() > 1 else 0
    if not isinstance(site, Module):
        return Call("", 0, ledger.exchanges, channels, x.dtype)
    place = ledger.layers.get(site)
    if place is None or place[0] in ledger.failed:
        place = ledger.layers[site] = [ledger.exchanges + 1, place[1] if place else 0]
    place[1] += 1
    path = site.__dict__.get("_path", "")
    layer = repr(path) if path else f"{type(site).__name__} (first met at exchange #{place[0]})"
    settings = repr(site) if check_level() == "full" else ""
    return Call(layer, place[1], ledger.exchanges, channels, x.dtype, settings, place[0])
