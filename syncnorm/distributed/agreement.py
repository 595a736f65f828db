"""Ranks agree, within the one row that they exchange, that they are at the same place: layer, direction, call, shape, dtype.

A rank's place is hashed to two 16-bit words h, and the row carries Σh and Σh²: all R ranks agree exactly if R·Σh² = (Σh)².
Only where they do not, they tell each other through the store who is where, and every rank raises.
"""

# R ranks, n words of payload

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import NUM_WORDS, Call, Ledger, check_level, ledger_of, unsettled
from syncnorm.distributed.notes import gather_notes
from syncnorm.distributed.observers import observed
from syncnorm.distributed.row import Payload, Sums, on_host, words_of
from syncnorm.distributed.verdict import POISON, STAND_IN, Answer, check_word, compare, compare_later
from syncnorm.distributed.watch import is_watching, sum_watched
from syncnorm.distributed.wire import agree_on_check, forget, has_way_before, settings, sum_as_before, sum_row
from syncnorm.errors import SyncNormMismatch, SyncNormPeerLost, SyncNormTimeout

__all__ = ["POISON", "dismiss", "meet", "num_begun", "stand_in", "sum_traced"]

_DISMISSED = -1.0  # in place of a length: those who stand in need not any longer
_NOWHERE = Call("", 0, 0, 0, None)


class _Own(threading.local):
    begun = 0


_own = _Own()


def num_begun() -> int:
    """Exchanges that this thread has come to, over any group."""
    return _own.begun


def meet(
    payload: Payload, group: Group, call: Call | None, direction: str, word: float = 0.0, *, always: bool = False
) -> Any:
    """Add ``payload`` up over the ranks of ``group``, and make sure that all of them meant the same. Not in a traced graph.

    Args:
        payload: What this rank brings, of one size on all.
        group: The ranks that meet, more than one.
        call: The forward call that it belongs to.
        direction: ``"forward"``, ``"backward"`` and the like.
        word: 0, 1 if a backward exchange follows on this rank, or :data:`POISON`.
        always: Compare at any level of :func:`set_check`, and at once wherever the row is.

    Returns:
        What the payload makes of the sum.

    Raises:
        SyncNormMismatch: On every rank, if they are at different places or disagree on ``word``. For rows that are not in
            host memory it is raised at a later exchange, when the words have arrived there.
    """
    if unsettled and group.name in unsettled:
        _settle(group, payload.device)
    n = payload.num_words
    if not always and check_level() == "off":
        words: tuple[float, ...] = (word,) if direction == "forward" else ()
        total = _sum(payload.pack(n + len(words), words), group, lambda: direction)
        result, heard = payload.read(total, len(words))
        if heard:
            check_word(Answer.read([*heard, *[0.0] * (NUM_WORDS - 1)], group), group, word, None)
        return result
    ledger, call = ledger_of(group), call or _NOWHERE
    if ledger.settings is None:
        agree_on_check(group.name)
    words = (word, float(n), *call.hashes(direction, n))

    def place() -> str:
        return f"{call.place(direction)}, exchange #{ledger.exchanges + 1}"

    while True:
        fits = ledger.fits(n)
        packed = (payload if fits else _nothing(payload.device)).pack(ledger.width, words)
        alone = None if fits else payload.pack(n, ())  # here, as it may fail, and the others must not wait for it then
        total = _sum(packed, group, place)
        ledger.exchanges += 1
        if ledger.settings is None:
            ledger.settings = settings()
        result, heard = payload.read(total, NUM_WORDS) if fits else (None, words_of(total, NUM_WORDS))
        if heard is None and always:
            heard = total[-NUM_WORDS:].tolist()
        if heard is None:
            compare_later(total[-NUM_WORDS:], group, call.place(direction), ledger)
        else:
            _compare(heard, ledger, group, call, direction, word, n)
        if alone is None:
            return result
        if not ledger.grow(n):  # agreed upon, so it may go by itself
            return payload.read(_sum(alone, group, lambda: call.place(direction)), 0)[0]


def _settle(group: Group, device: torch.device) -> None:
    """Say, in an exchange as they were, that this rank was set otherwise: all ranks were, or it is an error on all."""
    ledger, now = ledger_of(group), settings()
    changed, compared = ledger.settings != now, ledger.settings is not None and ledger.settings[1] != "off"
    is_watched = is_watching() and device.type == "cpu"
    if changed and compared and (is_watched or has_way_before(group.name, device.type)):
        change = f"change to the exchange {now[0]!r} and the check {now[1]!r}"
        call = Call("", 0, ledger.exchanges, 0, None)
        packed = _nothing(device).pack(ledger.width, (0.0, 0.0, *call.hashes(change, 0)))
        total = _sum(packed, group, lambda: f"a {change}", sum_as_before)
        ledger.exchanges += 1
        _compare(total[-NUM_WORDS:].tolist(), ledger, group, call, change, 0.0, 0)
    forget(group.name, changed=changed)
    ledger.settings = now
    unsettled.discard(group.name)


def _compare(heard: list[float], ledger: Ledger, group: Group, call: Call, direction: str, word: float, n: int) -> None:
    try:
        compare(heard, group, call, direction, word, ledger.exchanges, n)
    except SyncNormMismatch:
        ledger.failed.add(ledger.exchanges)
        raise


def sum_traced(row: Tensor, group: Group, direction: str, word: float = 0.0) -> Tensor:
    """Sum ``row`` [n] over the ranks of ``group`` in a graph that is traced, where nothing is compared."""
    if direction != "forward":
        return sum_row(row.clone(), group)
    return sum_row(torch.cat([row, row.new_full((1,), word)]), group)[:-1]


def stand_in(group: Group, device: torch.device) -> bool:
    """Answer one exchange of the others with nothing, as a rank that has run out of data.

    Returns:
        Whether there will be another one.
    """
    ledger = ledger_of(group)
    place = "no layer: it has run out of data and stands in"
    packed = _nothing(device).pack(ledger.width, (STAND_IN, *[0.0] * (NUM_WORDS - 1)))
    total = _sum(packed, group, lambda: place)
    ledger.exchanges += 1
    answer = Answer.read(total[-NUM_WORDS:].tolist(), group)
    if answer.length < 0 or not answer.ranks:  # nobody has data any longer
        return False
    if answer.differ or answer.refused or answer.with_backward not in (0, answer.ranks):
        if device.type == "cpu":
            gather_notes(group, place, STAND_IN)  # the others gather
        return False
    n = answer.length
    if not ledger.fits(n) and not ledger.grow(n):
        _sum(torch.zeros(n, dtype=torch.float64, device=device), group, lambda: place)
    return True


def dismiss(group: Group, device: torch.device) -> None:
    """Let those who stand in go; all ranks that do not stand in call this together."""
    ledger = ledger_of(group)
    packed = _nothing(device).pack(ledger.width, (0.0, _DISMISSED, *[0.0] * (NUM_WORDS - 2)))
    _sum(packed, group, lambda: "the end of all data")
    ledger.exchanges += 1


def _nothing(device: torch.device) -> Sums:
    return Sums(torch.zeros(0, dtype=torch.float64, device=device))


def _sum(
    row: Tensor, group: Group, place: Callable[[], str], carry: Callable[[Tensor, Group], Tensor] | None = None
) -> Tensor:
    """Sum the row, and say where this rank is if somebody does not come."""
    _own.begun += 1
    return observed(row, _carry, row, group, place, carry or sum_row)


def _carry(row: Tensor, group: Group, place: Callable[[], str], carry: Callable[[Tensor, Group], Tensor]) -> Tensor:
    if is_watching() and on_host(row):
        return sum_watched(row, group, place())
    try:
        return carry(row, group)
    except (SyncNormPeerLost, SyncNormTimeout) as error:
        raise type(error)(f"{error} This rank was in {place()}.") from error
