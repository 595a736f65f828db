"""A rank that has run out of data stands in for itself: it answers the exchanges of the others with a count of zero.

In the end all ranks have the buffers of the one that has counted the most batches.
"""

import threading
import time
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from syncnorm.distributed.agreement import dismiss, stand_in
from syncnorm.distributed.collectives import (
    all_reduce_sum,
    find_group,
    group_device,
    group_position,
    group_ranks,
    group_timeout,
    make_beside,
)
from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import Group, GroupSpec, resolve
from syncnorm.distributed.ledger import begin_anew
from syncnorm.errors import SyncNormError

__all__ = ["Join", "Joinable", "StandIn", "forget_twin", "twin_of"]

_PATIENCE = 5.0  # seconds

# By the group. Kept for the next time, as to make one connects all of its ranks.
_twins: WeakKeyDictionary[Any, GroupSpec] = WeakKeyDictionary()


def twin_of(spec: GroupSpec) -> tuple[GroupSpec, Group]:
    """Another group of the same ranks, made by all of them together at the first time, and its spec.

    What stands in answers from a thread of its own, while DDP's hook meets the same ranks from the main thread; over one group
    the two would get into each other's way.
    """
    group = resolve(spec)
    live = find_group(group.name)
    made = _twins.get(live)
    if made is None or group_ranks(made.name) != made.ranks:
        limit = group_timeout(group.name, group_device(group.name).type)
        name = make_beside(group.name, "twin", dist.get_backend_config(live), limit)
        made = _twins[live] = GroupSpec("named", name=name, ranks=group_ranks(name))
    twin = resolve(made)
    begin_anew(twin)
    return made, twin


def forget_twin(spec: GroupSpec) -> None:
    """Make another one the next time: the ranks of this one are out of step."""
    with suppress(RuntimeError, ValueError, KeyError):  # it may have gone with the world
        _twins.pop(find_group(resolve(spec).name), None)


class StandIn(Joinable):
    """Torch's protocol for uneven inputs, for the exchanges of synchronised layers.

    Args:
        buffers: Of each group that layers meet over, and that nothing else uses, their buffers.
        device: Where their rows are.

    Attributes:
        threads: That answer, one for each group, once this rank has run out of data.
        failures: Why they could not answer on.
    """

    def __init__(self, buffers: dict[Group, list[Tensor]], device: torch.device) -> None:
        super().__init__()
        self.buffers, self.device = buffers, device
        self.threads: list[threading.Thread] = []
        self.failures: list[SyncNormError] = []

    def join_hook(self, **_: Any) -> JoinHook:
        """What a rank does that has no more data."""
        return _Answering(self)

    @property
    def join_device(self) -> torch.device:
        """Where torch's own word of the protocol is exchanged."""
        return self.device

    @property
    def join_process_group(self) -> Any:
        """The world."""
        return dist.group.WORLD

    def notify(self) -> None:
        """Tell the others that this rank begins a step."""
        Join.notify_join_context(self)

    def failure(self) -> SyncNormError | None:
        """Why this rank could not answer on, if it was one that answers: who has gone is known in a few seconds."""
        deadline = time.monotonic() + _PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.failures[0] if self.failures else None


class _Answering(JoinHook):
    def __init__(self, stand_in: StandIn) -> None:
        self.own = stand_in

    def main_hook(self) -> None:
        if self.own.threads:
            return
        for group in self.own.buffers:
            thread = threading.Thread(target=self._answer, args=(group,), name="syncnorm-stand-in", daemon=True)
            thread.start()
            self.own.threads.append(thread)

    def post_hook(self, is_last_joiner: bool) -> None:
        if not self.own.threads:
            for group in self.own.buffers:
                dismiss(group, self.own.device)
        for thread in self.own.threads:
            thread.join()
        if self.own.failures:
            raise self.own.failures[0]
        for group, buffers in self.own.buffers.items():
            _take_the_latest(buffers, group)

    def _answer(self, group: Group) -> None:
        try:
            while stand_in(group, self.own.device):
                pass
        except SyncNormError as error:
            self.own.failures.append(error)


@torch.no_grad()
def _take_the_latest(buffers: list[Tensor], group: Group) -> None:
    counted = sum(int(b) for b in buffers if not b.is_floating_point())
    row = torch.tensor([counted], dtype=torch.int64, device=group_device(group.name))
    mine = int(gather_rows(row, group).argmax()) == group_position(group.name)
    for buffer in buffers:
        buffer.copy_(all_reduce_sum(buffer.clone() if mine else torch.zeros_like(buffer), group.name))
