"""Ranks agree, within the one row that they exchange, that they are at the same place: layer, direction, call, shape, dtype.

A rank's place is hashed to two 16-bit words h, and the row carries Σh and Σh²: all R ranks agree exactly if R·Σh² = (Σh)².
Only where they do not, they tell each other through the store who is where, and every rank raises. All rows of a group have
one width, so that rows of two layers never meet with two lengths: gloo ends a healthy process there, or leaves stale bytes.
"""

# R ranks, n words of payload

import os
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from syncnorm._version import __version__
from syncnorm.distributed.collectives import find_group
from syncnorm.distributed.groups import Group
from syncnorm.distributed.notes import gather_notes
from syncnorm.distributed.verdict import POISON, STAND_IN, Answer, check_word, raise_places
from syncnorm.distributed.watch import is_watching, sum_watched
from syncnorm.distributed.wire import sum_row
from syncnorm.errors import SyncNormMismatch, SyncNormPeerLost, SyncNormTimeout

__all__ = [
    "POISON",
    "Call",
    "begin_anew",
    "begin_call",
    "check_level",
    "dismiss",
    "set_check",
    "stand_in",
    "sum_agreed",
]

LEVELS = ("off", "inline", "full")

_WORDS = 6  # the word above, the length of the payload, and h, h² of two hashes
_DISMISSED = -1.0  # in place of a length: those who stand in need not any longer
_FIRST_WIDTH = 256
_LARGEST_WIDTH = 4224  # 2·2048 + 1 and the words, in steps of 128
_STEP = 128

_level: str | None = None


def set_check(level: str) -> None:
    """Choose how much the ranks compare at every exchange of a synchronised layer; on all ranks alike.

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
    _level = level


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

    __slots__ = ("channels", "dtype", "first", "layer", "number", "settings", "turn")

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


class _Ledger:
    """What a rank remembers of one live group: the width of its rows, and which layers have met there."""

    def __init__(self) -> None:
        self.width = _FIRST_WIDTH
        self.exchanges = 0
        self.layers: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()  # first exchange, forward calls
        self.failed: set[int] = set()  # exchanges; who first met at one of these, alone, did not
        self.deferred: deque[tuple[Tensor, Any, str, int]] = deque()

    def fits(self, n: int) -> bool:
        return n + _WORDS <= self.width

    def grow(self, n: int) -> bool:
        """Make rows long enough for ``n`` words, as all ranks do now; False if that would make all others too long."""
        if n + _WORDS > _LARGEST_WIDTH:
            return False
        self.width = -(-(n + _WORDS) // _STEP) * _STEP
        return True


_LEDGERS: WeakKeyDictionary[Any, _Ledger] = WeakKeyDictionary()


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
    ledger = _ledger(group)
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


def sum_agreed(
    row: Tensor, group: Group, call: Call | None, direction: str, word: float = 0.0, *, always: bool = False
) -> Tensor:
    """Sum ``row`` over the ranks of ``group``, and make sure that all of them meant the same row.

    Args:
        row: float64 ``[n]``.
        group: The ranks that meet, more than one.
        call: The forward call that it belongs to.
        direction: ``"forward"``, ``"backward"`` and the like.
        word: 0, 1 if a backward exchange follows on this rank, or :data:`POISON`.
        always: Compare at any level of :func:`set_check`, and at once wherever the row is.

    Returns:
        The sum ``[n]``.

    Raises:
        SyncNormMismatch: On every rank, if they are at different places or disagree on ``word``. For rows that are not in
            host memory it is raised at a later exchange, when the words have arrived there.
    """
    if torch.compiler.is_compiling() or (check_level() == "off" and not always):
        if direction != "forward":
            return _sum(row.clone(), group, direction)
        total = _sum(torch.cat([row, row.new_full((1,), word)]), group, direction)
        if not torch.compiler.is_compiling() and _on_host(total):
            check_word(Answer.read([float(total.numpy()[-1]), *[0.0] * (_WORDS - 1)], group), group, word, None)
        return total[:-1]
    ledger = _ledger(group)
    call = call or Call("", 0, 0, 0, None)
    n = row.numel()
    words = (word, float(n), *_hashes(call, direction, n))
    while True:
        width, fits = ledger.width, ledger.fits(n)
        packed = _pack(row if fits else row[:0], width, words)
        total = _sum(packed, group, lambda: f"{call.place(direction)}, exchange #{ledger.exchanges + 1}")
        ledger.exchanges += 1
        on_host = _on_host(total)
        if always or on_host:
            told = (total.numpy() if on_host else total)[-_WORDS:].tolist()
            try:
                _compare(told, group, call, direction, word, ledger.exchanges, n)
            except SyncNormMismatch:
                ledger.failed.add(ledger.exchanges)
                raise
        else:
            _compare_later(total[-_WORDS:], group, call.place(direction), ledger)
        if fits:
            return total[:n]
        if not ledger.grow(n):  # agreed upon, so it may go by itself
            return _sum(row.clone(), group, call.place(direction))


def stand_in(group: Group, device: torch.device) -> bool:
    """Answer one exchange of the others with nothing, as a rank that has run out of data.

    Returns:
        Whether there will be another one.
    """
    ledger = _ledger(group)
    place = "no layer: it has run out of data and stands in"
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    total = _sum(_pack(nothing, ledger.width, (STAND_IN, *[0.0] * (_WORDS - 1))), group, place)
    ledger.exchanges += 1
    answer = Answer.read(total[-_WORDS:].tolist(), group)
    if answer.length < 0 or not answer.ranks:  # nobody has data any longer
        return False
    if answer.differ or answer.refused or answer.with_backward not in (0, answer.ranks):
        if device.type == "cpu":
            gather_notes(group, place, STAND_IN)  # the others gather
        return False
    n = answer.length
    if not ledger.fits(n) and not ledger.grow(n):
        _sum(torch.zeros(n, dtype=torch.float64, device=device), group, place)
    return True


def dismiss(group: Group, device: torch.device) -> None:
    """Let those who stand in go; all ranks that do not stand in call this together."""
    ledger = _ledger(group)
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    _sum(_pack(nothing, ledger.width, (0.0, _DISMISSED, *[0.0] * (_WORDS - 2))), group, "the end of all data")
    ledger.exchanges += 1


def _sum(row: Tensor, group: Group, place: str | Callable[[], str]) -> Tensor:
    """Sum the row, and say where this rank is, or what says it, if somebody does not come."""
    if torch.compiler.is_compiling():
        return sum_row(row, group)
    if is_watching() and _on_host(row):
        return sum_watched(row, group, place if isinstance(place, str) else place())
    try:
        return sum_row(row, group)
    except (SyncNormPeerLost, SyncNormTimeout) as error:
        raise type(error)(f"{error} This rank was in {place if isinstance(place, str) else place()}.") from error


def _ledger(group: Group) -> _Ledger:
    live = find_group(group.name)
    ledger = _LEDGERS.get(live)
    if ledger is None:
        ledger = _LEDGERS[live] = _Ledger()
    return ledger


def _hashes(call: Call, direction: str, n: int) -> tuple[float, ...]:
    where = f"{call.layer}|{call.first}|{direction}|{call.number}"
    text = f"{__version__}|{where}|{call.channels}|{call.dtype}|{n}|{call.settings}"
    crc = zlib.crc32(text.encode())
    low, high = float(crc & 0xFFFF), float(crc >> 16)
    return low, low * low, high, high * high


def _on_host(row: Tensor) -> bool:
    # Beneath torch.func a tensor may be a wrapper, whose memory cannot be looked at.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(row)
    return row.device.type == "cpu" and type(row) is Tensor and not wrapped


def _pack(row: Tensor, width: int, words: tuple[float, ...]) -> Tensor:
    if _on_host(row):
        packed = torch.zeros(width, dtype=torch.float64)
        memory = packed.numpy()  # host memory: no tensor operations, which would cost 3 µs each
        memory[: row.numel()] = row.numpy()
        memory[-_WORDS:] = words
        return packed
    if row.is_cuda and torch.cuda.is_current_stream_capturing():
        tail = row.new_zeros(_WORDS)  # a replay could not read words from the host; nobody looks at these
    else:
        tail = torch.tensor(words, dtype=torch.float64, pin_memory=row.is_cuda).to(row.device, non_blocking=True)
    return torch.cat([row, row.new_zeros(width - row.numel() - _WORDS), tail])


def _compare(
    words: list[float], group: Group, call: Call, direction: str, word: float, exchange: int, length: int
) -> None:
    size, (total, _, low, low_squares, high, high_squares) = group.size, words
    if total in (0.0, size) and size * low_squares == low * low and size * high_squares == high * high:
        return  # what happens; the rest has time
    answer, place = Answer.read(words, group), call.place(direction)
    if answer.differ and not answer.refused:  # a refusal explains more than where the others were
        raise_places(group, place, call.more(length), word, exchange)
    check_word(answer, group, word, place)


def _compare_later(words: Tensor, group: Group, place: str, ledger: _Ledger) -> None:
    """Look at words on an accelerator once they have reached the host, without making it wait."""
    if type(words) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(words):
        return
    if words.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    event = None
    if words.is_cuda:
        host = torch.empty(_WORDS, dtype=torch.float64, pin_memory=True)
        host.copy_(words, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    else:
        host = words.to("cpu")
    ledger.deferred.append((host, event, place, ledger.exchanges))
    while ledger.deferred and (ledger.deferred[0][1] is None or ledger.deferred[0][1].query()):
        seen, _, then, exchange = ledger.deferred.popleft()
        answer = Answer.read(seen.tolist(), group)
        if answer.differ:
            raise SyncNormMismatch(
                f"exchange #{exchange}: ranks were in different places; this rank was in {then}. All ranks must run the same "
                "synchronised layers in the same order. Found out later, to keep the device from waiting: the steps since "
                "then are wrong, too. With SYNCNORM_CHECK=inline on CPU every rank is named."
            )
        if answer.refused or answer.with_backward not in (0, answer.ranks):
            raise SyncNormMismatch(
                f"exchange #{exchange}, in {then}: ranks disagreed on whether a backward follows, or one of them refused its "
                "input. Found out later, to keep the device from waiting."
            )
