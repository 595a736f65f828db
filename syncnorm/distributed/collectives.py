"""The only file that spells torch's collective names, and what torch keeps private about a group.

Eager calls use the plain in-place collective (on gloo the functional one costs a third more: 381 against 302 µs for one
small row); a traced call uses the functional one, which torch.compile can keep in one graph.
"""

import hashlib
import os
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.distributed.processes import refuse_fork
from syncnorm.errors import SyncNormError

__all__ = [
    "all_gather",
    "all_reduce_sum",
    "available_backends",
    "begin_all_reduce",
    "find_group",
    "group_backend",
    "group_device",
    "group_position",
    "group_ranks",
    "group_store",
    "group_timeout",
    "has_world",
    "is_initialized",
    "make_beside",
    "refuse_inherited",
    "set_group_timeout",
]


def is_initialized() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


# The process that made the world which this one was forked with, and that world; a fork may make one of its own.
_inherited: tuple[int, Any] = (os.getpid(), lambda: None)


def _note_fork() -> None:
    global _inherited
    world = dist.group.WORLD if is_initialized() else None
    if world is not None and _inherited[1]() is not world:
        _inherited = os.getppid(), weakref.ref(world)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def refuse_inherited() -> None:
    """Raise in a process that was forked with the world, before it has met anybody in the place of its rank."""
    pid, world = _inherited
    if world() is not None and world() is dist.group.WORLD:
        refuse_fork(pid, dist.get_rank())


def available_backends() -> list[str]:
    """What this build of torch can carry collectives by."""
    names = ("gloo", "nccl", "mpi", "xccl") if dist.is_available() else ()
    return [name for name in names if getattr(dist, f"is_{name}_available", bool)()]


def has_world() -> bool:
    """:func:`is_initialized` as Dynamo can read it: that one it takes for a constant."""
    return dist.is_available() and dist.distributed_c10d._world.default_pg is not None


def find_group(name: str) -> dist.ProcessGroup:
    """The process group of that name.

    Raises:
        SyncNormError: If there is none, or no longer.
    """
    resolve: Callable[[str], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group  # type: ignore[assignment, unused-ignore]
    try:
        return resolve(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise SyncNormError(
            f"the process group {name!r} does not exist here (any more). A layer needs the group of its forward in its "
            "backward, too: destroy groups after the last backward."
        ) from error


def group_ranks(name: str) -> tuple[int, ...]:
    """Global ranks of the named group, ascending; empty if there is no such group."""
    try:
        return tuple(dist.get_process_group_ranks(find_group(name)))
    except (RuntimeError, ValueError, KeyError):
        return ()


def group_position(name: str) -> int:
    """This rank's place among the ranks of the named group, from 0; 0 without a group."""
    return dist.get_rank(find_group(name)) if name else 0


def group_device(name: str) -> torch.device:
    """A device that the named group can exchange tensors on: CPU where it can, else the current accelerator."""
    devices = find_group(name)._device_types
    if not devices or any(device.type == "cpu" for device in devices):  # ranks that are threads register none
        return torch.device("cpu")
    return torch.device(devices[0].type, torch.accelerator.current_device_index())


def group_backend(name: str, device_type: str) -> str:
    """What carries the named group's collectives on tensors of a device type, such as ``"gloo"``; empty if nothing does."""
    pairs = (pair.partition(":") for pair in dist.get_backend_config(find_group(name)).split(","))
    return next((backend for device, _, backend in pairs if device == device_type), "")


def group_timeout(name: str, device_type: str) -> timedelta:
    """How long a collective of the named group waits for a rank."""
    options = getattr(find_group(name)._get_backend(torch.device(device_type)), "options", None)
    timeout: timedelta = getattr(options, "_timeout", dist.default_pg_timeout)
    return timeout


def set_group_timeout(name: str, timeout: timedelta) -> None:
    """Let collectives of the named gloo group wait that long from now on."""
    find_group(name)._get_backend(torch.device("cpu"))._set_default_timeout(timeout)


def group_store(name: str) -> dist.Store:
    """The store through which the world found together, with a corner for the named group."""
    return dist.PrefixStore(_corner(name), dist.distributed_c10d._get_default_store())


def _corner(name: str) -> str:
    members = hashlib.sha256(str(group_ranks(name)).encode()).hexdigest()[:16]  # disjoint groups may share a name
    return f"syncnorm/{name}/{members}"


def make_beside(name: str, purpose: str, backend: str, timeout: timedelta) -> str:
    """Make another group of the ranks of the named one, which all of them call and nobody else; its name.

    ``new_group(use_local_synchronization=True)`` names a group by how many a rank is in: two ranks that are not in equally
    many never meet there, nor do two threads, and a group cannot be made again.
    """
    ranks, torchs = group_ranks(name), dist.distributed_c10d
    place = ranks.index(dist.get_rank())
    number = dist.PrefixStore(purpose, group_store(name)).add(f"beside/{place}", 1)  # the same on all of them
    made = f"{_corner(name)}/{purpose}/{number}"
    live, _ = torchs._new_process_group_helper(
        len(ranks), place, list(ranks), dist.Backend(backend), torchs._get_default_store(),
        made,  # type: ignore[arg-type, unused-ignore]
        timeout=timeout, device_id=getattr(dist.group.WORLD, "bound_device_id", None),
    )  # fmt: skip
    torchs._world.pg_group_ranks[live] = {rank: place for place, rank in enumerate(ranks)}
    return made


def all_reduce_sum(row: Tensor, name: str) -> Tensor:
    """Sum ``row`` over the ranks of the named group; may reuse its memory."""
    if torch.compiler.is_compiling():
        pending = torch.ops._c10d_functional.all_reduce(row, "sum", name)
        return torch.ops._c10d_functional.wait_tensor(pending)  # type: ignore[no-any-return]
    dist.all_reduce(row, op=dist.ReduceOp.SUM, group=find_group(name))
    return row


def begin_all_reduce(row: Tensor, name: str) -> Any:
    """Begin to sum ``row`` over the ranks of the named group, in place.

    The work that is given back has ``wait(timedelta)``, which raises when that time is over and leaves the work going, and
    ``is_completed``.
    """
    return dist.all_reduce(row, op=dist.ReduceOp.SUM, group=find_group(name), async_op=True)


def all_gather(row: Tensor, name: str, size: int | None = None) -> Tensor:
    """Stack the rows of all ranks of the named group along a new leading dim; a traced call must know their number."""
    if torch.compiler.is_compiling():
        pending = torch.ops._c10d_functional.all_gather_into_tensor(row.unsqueeze(0), size, name)
        return torch.ops._c10d_functional.wait_tensor(pending)  # type: ignore[no-any-return]
    group = find_group(name)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return torch.stack(rows)
