"""What ranks make of summed words that are not as they should be: who is where, who refused, who needs a backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import NUM_WORDS, Call, Ledger
from syncnorm.distributed.notes import gather_notes
from syncnorm.errors import SyncNormMismatch

__all__ = ["POISON", "STAND_IN", "Answer", "check_word", "compare", "compare_later"]

# The word of a rank beside its place: 0, 1 where it needs a backward, POISON where its input was refused, STAND_IN where it
# has run out of data and answers without being anywhere. The sum tells them apart for up to 65,535 ranks.
POISON = float(2**32)
STAND_IN = float(2**16)


class Answer(NamedTuple):
    """What the summed words of all ranks say.

    Attributes:
        differ: Whether ranks are at different places.
        refused: How many refused their input.
        with_backward: How many need a backward.
        ranks: How many there are that do not stand in.
        length: Of the payload; negative where those who stand in may go.
    """

    differ: bool
    refused: int
    with_backward: int
    ranks: int
    length: int

    @classmethod
    def read(cls, words: Sequence[float], group: Group) -> "Answer":
        """From the words at the end of a summed row; see :mod:`.agreement`."""
        word, length, low, low_squares, high, high_squares = (float(w) for w in words)
        refused, rest = divmod(word, POISON)
        stand_ins, with_backward = divmod(rest, STAND_IN)
        ranks = group.size - int(stand_ins)
        differ = ranks * low_squares != low * low or ranks * high_squares != high * high
        return cls(differ, int(refused), int(with_backward), ranks, int(length) // max(ranks, 1))


def compare(
    words: Sequence[float], group: Group, call: Call, direction: str, word: float, exchange: int, length: int
) -> None:
    """Raise an error where the summed words say that ranks are at different places, or disagree on ``word``."""
    size, (total, _, low, low_squares, high, high_squares) = group.size, words
    if total in (0.0, size) and size * low_squares == low * low and size * high_squares == high * high:
        return  # what happens; the rest has time
    answer, place = Answer.read(words, group), call.place(direction)
    if answer.differ and not answer.refused:  # a refusal explains more than where the others were
        _raise_places(group, place, call.more(length), word, exchange)
    check_word(answer, group, word, place)


def compare_later(words: Tensor, group: Group, place: str, ledger: Ledger) -> None:
    """Look at words on an accelerator once they have reached the host, without making it wait."""
    if type(words) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(words):
        return
    if words.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    event = None
    if words.is_cuda:
        host = torch.empty(NUM_WORDS, dtype=torch.float64, pin_memory=True)
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
                "input or failed. Found out later, to keep the device from waiting."
            )


def _raise_places(group: Group, place: str, more: str, word: float, exchange: int) -> None:
    """Tell the others where this rank is, hear where they are, and raise an error that says it."""
    notes = gather_notes(group, place, word, more)
    alike = len({note.place for note in notes.values()}) == 1
    places = {rank: f"{note.place} ({note.more})" if alike else note.place for rank, note in notes.items()}
    where = "; ".join(f"ranks {ranks} in {shown}" for shown, ranks in _by_place(places).items())
    raise SyncNormMismatch(
        f"exchange #{exchange}: ranks are in different places: {where}. All ranks must run the same synchronised "
        "layers in the same order, all in train mode or all in eval mode, with inputs of one dtype. Nothing was changed on "
        "this rank by this call."
    )


def check_word(answer: Answer, group: Group, word: float, place: str | None) -> None:
    """Raise an error where a rank refused its input or ranks disagree on a backward; ``place`` None names nobody."""
    if not answer.refused and answer.with_backward in (0, answer.ranks):
        return
    notes = {} if place is None else gather_notes(group, place, word)

    def ranks(word: float) -> list[int]:
        return [rank for rank, note in notes.items() if note.word == word]

    def named(word: float) -> str:
        return f" (ranks {ranks(word)}, at {place})" if notes else ""

    if answer.refused:
        raise SyncNormMismatch(
            f"{answer.refused} of {group.size} ranks refused their input to this call{named(POISON)}, or failed in it, and "
            "raised an error of their own; look there for the cause. Nothing was changed on this rank."
        )
    others = f"ranks {ranks(0)}" if notes else "the others"
    raise SyncNormMismatch(
        f"{answer.with_backward} of {group.size} ranks need a backward pass through this call{named(1)} and {others} do not "
        f"(this rank {'does' if word else 'does not'}). All ranks must agree on requires_grad of the input and the affine "
        "parameters, and on torch.no_grad(), or the backward exchange would wait forever."
    )


def _by_place(places: dict[int, str]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for rank, place in places.items():
        grouped.setdefault(place, []).append(rank)
    return grouped
