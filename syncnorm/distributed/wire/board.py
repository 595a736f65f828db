"""Notes of the ranks of a group to each other, in the store through which the world found together."""

import json
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from syncnorm.distributed.notes import printable
from syncnorm.distributed.processes import has_ended, identity
from syncnorm.errors import SyncNormPeerLost, SyncNormTimeout

__all__ = ["Board"]

_LOOK = 1.0  # seconds between two looks after a neighbour


class Board:
    """Where ranks post and read. Reading polls: a blocking read would keep the store from other threads of this process.

    Args:
        store: A corner of the store for this board.
        place: This rank's place in the group.
        members: Global ranks of the group.
        limit: Seconds from now until a note that is missing is an error.
    """

    def __init__(self, store: dist.Store, place: int, members: tuple[int, ...], limit: float) -> None:
        self._store, self.place, self.members, self._limit = store, place, members, limit
        self._deadline = time.monotonic() + limit

    def post(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def introduce(self) -> None:
        """Say which process this is, for :meth:`read` on the ranks beside it."""
        self.post(f"process/{self.place}", identity())

    def read(self, keys: list[str]) -> list[Any]:
        """What these keys hold, once all are there; an error for all who read if a rank is seen not to come."""
        pause, look = 0.0002, time.monotonic() + _LOOK
        while True:
            if self._store.check(["left"]):
                text = printable(json.loads(self._store.get("left")), 400)
                raise SyncNormPeerLost(
                    f"{text} at the first exchange of the process group of ranks {list(self.members)}, and does not come."
                )
            if self._store.check(keys):
                return [json.loads(self._store.get(key)) for key in keys]
            if time.monotonic() > self._deadline:
                raise SyncNormTimeout(self.late())
            if time.monotonic() > look:
                self._look()
                look = time.monotonic() + _LOOK
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)

    def leave(self, why: str) -> None:
        """Tell those who read on that this rank does not."""
        with suppress(RuntimeError):  # the store itself may have gone
            self.post("left", f"rank {self.members[self.place]} was interrupted ({why})")

    def late(self) -> str:
        """Who has not come in time, in words."""
        missing = [rank for place, rank in enumerate(self.members) if not self._store.check([f"facts/{place}"])]
        who = (
            f"ranks {missing} did not come" if missing else f"rank {self.members[0]} or its answer did not come in time"
        )
        return (
            f"{who} to the first exchange of the process group of ranks {list(self.members)} within {self._limit:g} s, its "
            "time limit. All ranks of a group run its synchronised layers, in the same order."
        )

    def _look(self) -> None:
        """Tell all if the process of a rank beside this one has ended: two are few enough to ask for in a large group."""
        for place in {(self.place + step) % len(self.members) for step in (-1, 1)}:
            key = f"process/{place}"
            if self._store.check([key]) and has_ended(record := json.loads(self._store.get(key))):
                self.post("left", f"rank {self.members[place]} is gone (process {int(record['pid'])} has ended)")
