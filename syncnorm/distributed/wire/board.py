"""Notes of the ranks of a group to each other, in the store through which the world found together."""

import json
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from syncnorm.distributed.notes import printable
from syncnorm.errors import SyncNormPeerLost, SyncNormTimeout

__all__ = ["Board"]


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

    def read(self, keys: list[str]) -> list[Any]:
        pause = 0.0002
        while True:
            if self._store.check(["left"]):
                rank, why = json.loads(self._store.get("left"))
                raise SyncNormPeerLost(
                    f"rank {int(rank)} was interrupted ({printable(why, 300)}) at the first exchange of the process group of "
                    f"ranks {list(self.members)}, and does not come."
                )
            if self._store.check(keys):
                return [json.loads(self._store.get(key)) for key in keys]
            if time.monotonic() > self._deadline:
                raise SyncNormTimeout(self.late())
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)

    def leave(self, why: str) -> None:
        """Tell those who read on that this rank does not."""
        with suppress(RuntimeError):  # the store itself may have gone
            self.post("left", [self.members[self.place], why])

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
