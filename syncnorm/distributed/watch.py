"""Who does not come: names the rank that is gone, frozen or elsewhere, where gloo says that a connection was closed.

Exchanges of a watched group go over a process group of their own and are waited for in short turns. A thread of each rank
writes where it is to the store that the ranks found each other by, so that those who wait can tell a process that has ended
from one that is stopped and from one that runs other code, and one rank's finding reaches all.
"""

import atexit
import json
import threading
import time
import weakref
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist
from torch import Tensor

from syncnorm.distributed.assembly import GONE, acquaintances, assemble, failure_of
from syncnorm.distributed.collectives import (
    begin_all_reduce,
    find_group,
    group_ranks,
    group_store,
    is_initialized,
    make_beside,
    set_group_timeout,
)
from syncnorm.distributed.groups import Group
from syncnorm.distributed.notes import printable
from syncnorm.distributed.processes import identity, is_running
from syncnorm.errors import SyncNormError

__all__ = ["is_watching", "patience", "set_watch", "sum_watched"]

_TURN = 0.25  # seconds between two looks; what a fault costs beyond what finding it needs
_SILENCE = 2.0  # seconds without a word after which a rank does not answer: eight turns of its thread
_SHOWN = 200
_YEAR = 365 * 86400.0

_patience: float | None = None


def set_watch(seconds: float | None) -> None:
    """Watch over the exchanges of synchronised layers on CPU, on all ranks alike; off at first.

    With it a rank that was killed raises :class:`SyncNormPeerLost` on every other rank within seconds, and a rank that is
    stopped or busy elsewhere :class:`SyncNormTimeout` after ``seconds``, in place of gloo's time limit of half an hour. Either
    says of every rank which layer and call it was in last. Costs a thread that wakes four times a second, and a process group
    that lives as long as the world, for each group of ranks. Exchanges on an accelerator and inside ``torch.compile`` are not
    watched.

    Args:
        seconds: How long ranks wait for one that lives and does not come, ``math.inf`` for as long as it takes; None to stop
            watching.

    Raises:
        ValueError: If ``seconds`` is not positive.
    """
    global _patience
    if seconds is not None and not seconds > 0:
        raise ValueError(f"ranks must wait for some time, got {seconds} seconds. None stops the watch.")
    _patience = seconds
    if seconds is not None and is_initialized():  # so that a rank that ends before it has met anybody is known to have
        acquaintances().set(str(dist.get_rank()), json.dumps(identity()))


def patience() -> float | None:
    """The seconds of :func:`set_watch`."""
    return _patience


def is_watching() -> bool:
    """Whether :func:`set_watch` has been called with a time."""
    return _patience is not None


def sum_watched(row: Tensor, group: Group, place: str) -> Tensor:
    """Sum ``row``, in place, over the ranks of ``group``, and say who does not come.

    Args:
        row: On CPU.
        group: The ranks that meet, more than one.
        place: Where this rank is, for the errors of all.

    Raises:
        SyncNormPeerLost: If the process of a rank has ended.
        SyncNormTimeout: If a rank has not come in time.
    """
    assert _patience is not None
    post = _post(group, place, _patience)
    post.enter(place)
    work = begin_all_reduce(row, post.name)
    start, failure = time.monotonic(), None
    try:
        while failure is None:
            try:
                work.wait(timedelta(seconds=_TURN))
                return row
            except RuntimeError as error:
                broken = str(error) if work.is_completed() else None  # else a turn is over, and the work goes on
            failure = post.failure(time.monotonic() - start, broken, _patience)
    finally:
        if failure is None:  # else stay inside, for those who look where this rank has been
            post.leave()  # Ctrl-C included
    del work
    raise failure


class _Post:
    """This rank's place among the ranks of one group: what it tells them, and what it hears.

    All that goes through the store does so in a thread: where a link is cut, the store does not answer for minutes.
    """

    def __init__(self, live: Any, ranks: tuple[int, ...], me: int, name: str, store: Any) -> None:
        self._live = weakref.ref(live)  # the group that is watched
        self.ranks, self.me, self.name, self.store = ranks, me, name, store
        self.place, self.inside, self.meetings, self.limit = "", False, 0, timedelta(0)
        self.told: str | None = None
        self.told_kind = ""
        self.heard: dict[int, tuple[int, float]] = {}  # last count of a rank's thread, and when it was new
        self._count, self._finding = 0, ""
        self._identity = identity()
        self._write()
        store.wait([str(r) for r in ranks])
        self.records = self._read()
        # Kept, for the store may go with the rank that keeps it.
        self.seen_alive = {r: record for r, record in self.records.items() if is_running(record)}
        self._asked, self._answered, self._reached = threading.Event(), threading.Event(), True
        self._over = False
        _SERVED.add(self)
        self._thread = threading.Thread(target=self._serve, name=f"syncnorm-watch-{name}", daemon=True)
        self._thread.start()

    def enter(self, place: str) -> None:
        if self.told is not None:
            raise failure_of(self.told_kind, self.told)
        self.meetings += 1
        self.place, self.inside = place, True

    def leave(self) -> None:
        self.inside = False

    def end(self) -> None:
        """Let the thread come to its end, if the store lets go of it."""
        self._over = True
        self._asked.set()
        self._thread.join(_SILENCE)

    def failure(self, waited: float, broken: str | None, patience: float) -> SyncNormError | None:
        """What to raise after ``waited`` seconds, if anything; ``broken`` is gloo's own error."""
        deadline = time.monotonic() + (2 * _SILENCE if broken else 0.0)
        while True:
            gone = [r for r, record in self.seen_alive.items() if r != self.me and not is_running(record)]
            reached = self._look()  # after the processes: who ends because of a finding has told it
            if self.told is not None:
                return failure_of(self.told_kind, self.told)
            silent = self._silent()
            if gone:
                return self._find("lost", f"ranks {gone} are gone: their processes have ended", waited)
            if broken and silent:
                return self._find("lost", self._closed(silent), waited)
            if time.monotonic() >= deadline:
                break
            time.sleep(_TURN)
        if broken:
            text = f"a rank that lives has closed its connection ({broken.split(']')[-1].strip()[:_SHOWN]})"
            return self._find("lost", text, waited)
        if waited < patience:
            return None
        return self._find("late", self._late(silent) if reached else self._cut_off(), waited)

    def _closed(self, silent: list[int]) -> str:
        """A connection is closed, and these ranks are not heard of."""
        away = [r for r in silent if r not in self.seen_alive]
        if away:
            return f"ranks {away} are gone or cut off: their connections are closed and they do not answer"
        return f"ranks {silent} live, and have left their process group"

    def _late(self, silent: list[int]) -> str:
        late = [r for r in self.ranks if r != self.me and not self._is_here(self.records.get(r, {}))]
        parts = []
        if frozen := [r for r in late if r in silent]:
            parts.append(f"ranks {frozen} do not answer: stopped, frozen or cut off")
        inside = {r: self.records.get(r, {}).get("inside") or self.records.get(r, {}).get("other") for r in late}
        if away := [r for r in late if r not in silent and not inside[r]]:
            parts.append(f"ranks {away} run code outside of synchronised layers")
        if elsewhere := [r for r in late if r not in silent and inside[r]]:
            parts.append(f"ranks {elsewhere} wait in another exchange")
        return "; ".join(parts) or "all ranks are here and the exchange does not end"

    def _cut_off(self) -> str:
        others = [r for r in self.ranks if r not in self.seen_alive] or [r for r in self.ranks if r != self.me]
        return (
            f"this rank is cut off: the store through which ranks hear of each other does not answer, and neither do ranks "
            f"{others}"
        )

    def _is_here(self, record: dict[str, Any]) -> bool:
        return bool(record.get("inside")) and record.get("meetings") == self.meetings

    def _silent(self) -> list[int]:
        now, silent = time.monotonic(), []
        for rank, record in self.records.items():
            count, since = self.heard.get(rank, (-1, now))
            if record.get("count", -1) != count:
                self.heard[rank] = (record.get("count", -1), now)
            elif rank != self.me and now - since > _SILENCE:
                silent.append(rank)
        return silent

    def _find(self, kind: str, what: str, waited: float) -> SyncNormError:
        """Tell the others, and make the error."""
        places = "; ".join(f"rank {r} {_where(record)}" for r, record in sorted(self.records.items()))
        known = f"A moment ago: {places}" if self._reached else "The store, which knows where all were, is out of reach"
        text = f"{what}. Waited {waited:.1f} s in {self.place}. {known}. {GONE}"
        self.told, self.told_kind, self._finding = text, kind, json.dumps([kind, text])
        self._look()
        return failure_of(kind, text)

    def _look(self) -> bool:
        """Tell and hear at once; whether the store answered."""
        self._answered.clear()
        self._asked.set()
        return self._reached and self._answered.wait(_SILENCE) and self._reached

    def _serve(self) -> None:
        while not self._over and self._live() is not None and find_group_or_none(self.name) is not None:
            asked = self._asked.wait(_TURN)
            if asked:  # else it may have been set since
                self._asked.clear()
            try:
                if self._finding:
                    self.store.set("failure", self._finding)
                self._write()
                if self.told is None and self.store.check(["failure"]):
                    kind, text = json.loads(bytes(self.store.get("failure")))
                    self.told_kind, self.told = str(kind), printable(text, 4000)
                if asked:
                    self.records = self._read()
                    self._answered.set()
            except (
                RuntimeError
            ):  # it went with the rank that kept it, and each further word would be a warning of torch's
                self._reached = False
                self._answered.set()
                return

    def _read(self) -> dict[int, dict[str, Any]]:
        return {r: json.loads(bytes(self.store.get(str(r)))) for r in self.ranks}

    def _write(self) -> None:
        self._count += 1
        own = {"count": self._count, "inside": self.inside, "meetings": self.meetings, "place": self.place[:_SHOWN]}
        posts = [post for post in list(_SERVED) if post is not self and post.me == self.me and post.inside]
        posts.sort(key=lambda post: post.told is not None)
        own["other"] = f"{posts[0].place[:_SHOWN]} with ranks {list(posts[0].ranks)}" if posts else ""
        self.store.set(str(self.me), json.dumps({**own, **self._identity}))


_POSTS: WeakKeyDictionary[Any, _Post] = WeakKeyDictionary()
_SERVED: WeakSet[_Post] = WeakSet()


@atexit.register
def _end_all() -> None:
    # A thread that comes back from the store when Python has ended takes the process with it (std::terminate).
    for post in list(_SERVED):
        post.end()


def _post(group: Group, where: str, patience: float) -> _Post:
    live = find_group(group.name)
    post = _POSTS.get(live)
    # Gloo's own time limit lies behind ours, which knows whom to name.
    limit = timedelta(seconds=min(patience + 60, _YEAR))
    if post is None:
        ranks, me = group_ranks(group.name), dist.get_rank()
        try:
            assemble(group, ranks, ranks.index(me), patience)
        except SyncNormError as error:
            raise type(error)(f"{error} This rank was in {where}.") from None
        name = make_beside(group.name, "watch", "gloo", limit)
        store = dist.PrefixStore(f"watch/{name}", group_store(group.name))
        post = _POSTS[live] = _Post(live, ranks, me, name, store)
    if post.limit != limit:
        set_group_timeout(post.name, limit)
        post.limit = limit
    return post


def find_group_or_none(name: str) -> Any:
    """The process group of that name, if there still is one."""
    try:
        return find_group(name)
    except (RuntimeError, ValueError, KeyError):
        return None


def _where(record: dict[str, Any]) -> str:
    if record.get("other"):
        return f"in {printable(record['other'], 2 * _SHOWN)}"
    place = printable(record.get("place", ""), _SHOWN)
    if not place:
        return "has met nobody"
    return f"in {place}" if record.get("inside") else f"after {place}"
