"""What ranks tell each other once they know that something is wrong: short notes in the store, which are only ever shown."""

import json
import time
from typing import NamedTuple

from syncnorm.distributed.collectives import group_position, group_ranks, group_store
from syncnorm.distributed.groups import Group

__all__ = ["Note", "gather_notes", "printable"]

_PATIENCE = 10.0  # seconds to wait for a note; all ranks know at the same time that they differ
_SHOWN = 300


class Note(NamedTuple):
    """What one rank tells.

    Attributes:
        word: Its word in the exchange, see :data:`syncnorm.distributed.agreement.POISON`.
        place: Where it is.
        more: What else it was compared by.
    """

    word: float
    place: str
    more: str


def gather_notes(group: Group, place: str, word: float, more: str = "") -> dict[int, Note]:
    """The note of each global rank of ``group``; all its ranks call this.

    Through the store: a collective could meet one of DDP's that is under way on another rank, of another length, and gloo
    ends a healthy process then.
    """
    ranks, mine, store = group_ranks(group.name), group_position(group.name), group_store(group.name)
    turn = store.add(f"notes/{mine}", 1)  # the same on all ranks, as all of them come here each time
    store.set(f"notes/{turn}/{mine}", json.dumps([word, place[:_SHOWN], more[:_SHOWN]]))
    notes, deadline = {}, time.monotonic() + _PATIENCE
    for position, rank in enumerate(ranks):
        key = f"notes/{turn}/{position}"
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.002)
        told = json.loads(store.get(key)) if store.check([key]) else (0.0, "a place that it has not told", "")
        notes[rank] = Note(float(told[0]), printable(told[1], _SHOWN), printable(told[2], _SHOWN))
    # Whoever has come here again has read what was told last time: 2 kB of each rank's memory an error, were it kept.
    if turn > 1 and store.check([f"notes/{turn}/{position}" for position in range(len(ranks))]):
        store.delete_key(f"notes/{turn - 1}/{mine}")
    return notes


def printable(text: object, length: int) -> str:
    """Text from elsewhere, cut, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:length])
