"""The seam of the wire: one row in, its sum over the ranks of a group out, the same bits on all of them.

The collective of torch is the default and the meaning. Other ways give the same row sooner; the ranks of a group agree on
one of them at their first exchange (:mod:`.handshake`).
"""

import os
import threading
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from syncnorm.core.traced import constant_while_traced
from syncnorm.distributed.collectives import all_reduce_sum, find_group, group_backend
from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import check_level, note_change, unsettled
from syncnorm.distributed.wire.handshake import Way, agree, own_objection
from syncnorm.errors import SyncNormError

__all__ = [
    "Exchange",
    "agree_on_check",
    "describe",
    "forget",
    "has_way_before",
    "set_exchange",
    "settings",
    "sum_as_before",
    "sum_row",
]

Exchange = Literal["auto", "collective", "shm", "symmetric"]


class _Ways(dict[str, Way]):
    """The ways of one group, by device type; agreed on under the lock, as threads may come together."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.check = threading.Lock(), check_level()


_asked: Exchange | None = None
# By the group itself and not by its name: the next group may have the same.
_ways: WeakKeyDictionary[Any, _Ways] = WeakKeyDictionary()
# Those from before a set_exchange: by them its ranks say that they were told so.
_former: WeakKeyDictionary[Any, _Ways] = WeakKeyDictionary()


def set_exchange(name: Exchange | None) -> Exchange | None:
    """Say how the sums of synchronised layers travel between ranks, in this process.

    Every rank says the same, at the same point of its program: the ranks of a group compare at the next exchange, and a
    difference, or a rank that says something else alone, is an error on all of them (not where ``set_check("off")``). The
    environment variable ``SYNCNORM_EXCHANGE`` says it from outside.

    Args:
        name: ``"collective"``: torch's all-reduce (gloo, NCCL). ``"shm"``: memory shared by the ranks of one host, for
            rows on CPU. ``"symmetric"``: memory that GPUs of one host lend each other over NVLink, for rows on CUDA. Either
            is an error on all ranks where it is impossible. ``"auto"``: shared memory where all ranks of a
            group have proven it, else the collective. None: what the environment says, ``"auto"`` without it.

    Returns:
        What was set before, to be put back.

    Raises:
        ValueError: For another name.

    Example:
        >>> before = syncnorm.set_exchange("collective")
        >>> _ = syncnorm.set_exchange(before)
    """
    global _asked
    if name is not None:
        _check(name, "set_exchange takes")
    before, _asked = _asked, name
    note_change()
    for live, ways in _ways.items():
        if live.group_name in unsettled:
            _former.setdefault(live, ways)
    _ways.clear()  # groups agree anew
    return before


def settings() -> tuple[str, str]:
    """What is set in this process, and must be the same on all ranks: how rows travel, and how much is compared."""
    return _setting(), check_level()


def has_way_before(name: str, device_type: str) -> bool:
    """Whether the named group agreed on a way for rows on a type of device, before the last change of settings."""
    return device_type in _before(name)


def sum_as_before(row: Tensor, group: Group) -> Tensor:
    """:func:`sum_row` by what the group had agreed on before the last change of settings."""
    carrier = _before(group.name)[row.device.type].carrier
    return all_reduce_sum(row, group.name) if carrier is None else carrier.sum(row)


def forget(name: str, *, changed: bool) -> None:
    """What was before a change is no more: the named group agrees anew, or goes on as it was if nothing has changed."""
    live = find_group(name)
    before = _former.pop(live, None)
    if changed:
        _ways.pop(live, None)
    elif before is not None:
        _ways.setdefault(live, before)


def agree_on_check(name: str) -> None:
    """Before the first row that is compared: where the named group agreed at ``"off"``, it does so anew.

    Ranks of which one alone compares would bring rows of two lengths, where gloo ends a healthy process.
    """
    ways = _ways.get(find_group(name), _Ways())
    if ways.check != check_level() and all(way.carrier is None for way in ways.values()):
        del _ways[find_group(name)]


def _before(name: str) -> dict[str, Way]:
    live = find_group(name)
    return _former.get(live) or _ways.get(live) or {}


def sum_row(row: Tensor, group: Group) -> Tensor:
    """Sum ``row`` over the ranks of ``group``, which all call this; may reuse its memory.

    Args:
        row: float64, contiguous, of one shape on all ranks.
        group: The ranks that meet, more than one.

    Returns:
        Tensor like ``row``, bit for bit the same on all ranks.

    Raises:
        SyncNormError: See :func:`.handshake.agree`, at the first row of a group, and :meth:`.shm.Segment.sum`
            and :meth:`.symmetric.Symmetric.sum`.
    """
    if torch.compiler.is_compiling():
        # Inductor keeps functional collectives in their order and moves any other operator as it likes: two rows would meet
        # the wrong partners (two layers of a BatchNormLSTM did). Eager ranks of the group wait for this one to agree, though.
        _traced_way(group.name, row.device.type)
        return all_reduce_sum(row, group.name)
    carrier = _way(group.name, row.device.type).carrier
    return all_reduce_sum(row, group.name) if carrier is None else carrier.sum(row)


def describe(name: str, device_type: str) -> str:
    """How the rows of the named group travel, as far as this rank can tell alone."""
    ways = _ways.get(find_group(name))
    if ways is not None and device_type in ways:
        return f"{ways[device_type].name}: {ways[device_type].why}"
    asked = _setting()
    backend = group_backend(name, device_type)
    if asked == "collective" or backend not in _AGREE:
        return f"collective ({backend})"
    mine, wanted = own_objection(asked, device_type), "symmetric" if asked == "symmetric" else "shm"
    here = f"this rank objects to {wanted}: {mine}" if mine else f"this rank could use {wanted}"
    return f"{asked!r} of {list(get_args(Exchange))}, agreed at the first exchange; {here}"


# The carriers of real processes that have a store in common; others (fake, threaded) are collectives and nothing else.
_AGREE = ("gloo", "nccl")


def _way(name: str, device_type: str) -> Way:
    group = find_group(name)
    ways = _ways.get(group)
    if ways is None:
        ways = _ways.setdefault(group, _Ways())
    way = ways.get(device_type)
    if way is None:
        with ways.lock:
            way = ways.get(device_type)
            if way is None:
                way = ways[device_type] = _new_way(name, device_type)
    return way


def _new_way(name: str, device_type: str) -> Way:
    asked, backend = _setting(), group_backend(name, device_type)
    if backend in _AGREE:
        return agree(name, device_type, asked)
    if asked in ("shm", "symmetric"):
        raise SyncNormError(f'the exchange "{asked}" was asked for by name and is not made for groups of {backend!r}.')
    return Way("collective", f"groups of {backend!r} have nothing else")


def _setting() -> Exchange:
    if _asked is not None:
        return _asked
    name = os.environ.get("SYNCNORM_EXCHANGE") or "auto"
    return _check(name, "SYNCNORM_EXCHANGE is")


def _check(name: str, where: str) -> Exchange:
    if name not in get_args(Exchange):
        raise ValueError(f"{where} one of {list(get_args(Exchange))}, got {name!r}.")
    return name  # type: ignore[return-value]


@constant_while_traced
def _traced_way(name: str, device_type: str) -> str:
    return _way(name, device_type).name
