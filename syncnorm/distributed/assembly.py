"""Ranks come together before they are watched: all, or they hear alike who is missing.

To make a process group waits for all of its ranks, and names nobody.
"""

import json
import time

import torch.distributed as dist

from syncnorm.distributed.collectives import group_store
from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import check_level
from syncnorm.distributed.notes import printable
from syncnorm.distributed.processes import has_ended
from syncnorm.distributed.wire.board import Board
from syncnorm.distributed.wire.handshake import unlike_checks
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormPeerLost, SyncNormTimeout

__all__ = ["GONE", "acquaintances", "assemble", "failure_of"]

GONE = "The group cannot be used again: end the run, or start it again from the last checkpoint."
_PAUSE = 0.25  # seconds, at most, between two looks


def assemble(group: Group, ranks: tuple[int, ...], place: int, patience: float) -> None:
    """Wait until all are here, or raise on all of them, those who come later included.

    Args:
        group: Whose ranks come together.
        ranks: They, as numbered in the world.
        place: That of this rank among them.
        patience: Seconds to wait.

    Raises:
        SyncNormPeerLost: If the process of a rank has ended.
        SyncNormTimeout: If a rank has not come in time.
        SyncNormMismatch: If they compare at different levels.
    """
    store = dist.PrefixStore("watch", group_store(group.name))
    # Numbered, for a group that is made again has the same name and may have the same store.
    store = dist.PrefixStore(str(store.add(f"made/{place}", 1)), store)
    board = Board(store, place, ranks, patience)
    board.post(f"facts/{place}", check_level())
    here, known = [f"facts/{other}" for other in range(len(ranks))], acquaintances()
    deadline, pause, found = time.monotonic() + patience, 0.001, ""
    while not found:
        told = {rank: json.loads(known.get(str(rank))) for rank in ranks if known.check([str(rank)])}
        gone = [rank for rank, record in told.items() if has_ended(record)]
        if store.check(here):
            unlike = unlike_checks([json.loads(level) for level in store.multi_get(here)], ranks)
            found = json.dumps(["mismatch", unlike] if unlike else ["here", ""])
        elif gone:
            found = json.dumps(["lost", f"ranks {gone} are gone: their processes have ended. {GONE}"])
        elif time.monotonic() >= deadline:
            found = json.dumps(["late", board.late()])
        else:
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
    # The finding of the first counts for all: by now it may have ended itself, or who was late may have come.
    kind, text = json.loads(store.compare_set("found", "", found))
    if kind != "here":
        raise failure_of(str(kind), printable(text, 4000))


def failure_of(kind: str, text: str) -> SyncNormError:
    """The error for a finding of some rank, which is ``"lost"``, ``"late"`` or ``"mismatch"``."""
    kinds = {"lost": SyncNormPeerLost, "late": SyncNormTimeout, "mismatch": SyncNormMismatch}
    return kinds[kind](text)


def acquaintances() -> dist.Store:
    """Where each rank of the world says which process it is, once it watches."""
    world = dist.group.WORLD
    assert world is not None
    return dist.PrefixStore("processes", group_store(world.group_name))
