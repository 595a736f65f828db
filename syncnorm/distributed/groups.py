"""Which ranks share statistics: a spec that a layer can carry anywhere, and the live group it stands for.

A layer holds a :class:`GroupSpec`, plain data, never a process group: layers are born before process groups, and a live
group can be neither copied nor pickled. :func:`resolve` finds the group when it is first needed.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from syncnorm.core.traced import constant_while_traced
from syncnorm.distributed import collectives
from syncnorm.distributed.processes import host
from syncnorm.errors import SyncNormError

__all__ = ["LOCAL", "Group", "GroupSpec", "group_spec", "known", "make_subgroups", "resolve"]


@dataclass(frozen=True)
class GroupSpec:
    """What a layer knows of its group.

    Attributes:
        kind: ``"world"``; ``"node"`` (ranks of one machine); ``"size"`` (blocks of consecutive ranks); ``"named"`` (a
            process group, remembered by name and ranks); ``"outside"`` (torch gave this rank no part in the group).
        size: Ranks per block, for ``"size"``.
        name: Name of the process group, for ``"named"``.
        ranks: Its global ranks, for ``"named"``.
    """

    kind: Literal["world", "node", "size", "named", "outside"] = "world"
    size: int = 0
    name: str = ""
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "size":
            return str(self.size)
        return f"ranks {list(self.ranks)}" if self.kind == "named" else self.kind


@dataclass(frozen=True)
class Group:
    """A live group: its name in torch's registry and how many ranks it has. A lone process is a group of one."""

    name: str = ""
    size: int = 1


LOCAL = Group()


def group_spec(process_group: Any) -> GroupSpec:
    """Understand what a user may pass as ``process_group``.

    Args:
        process_group: None or ``"world"`` (all ranks), ``"node"`` (the ranks of one machine), an int k (consecutive blocks
            of k ranks), a ``ProcessGroup``, a one-dimensional ``DeviceMesh`` (``mesh["dp"]`` of a larger one), or a
            :class:`GroupSpec`.

    Raises:
        ValueError: For another string, an int below 1, or a mesh of more than one dim.
        TypeError: For anything else.
    """
    if process_group is None or process_group == "world":
        return GroupSpec()
    if isinstance(process_group, GroupSpec):
        return process_group
    if process_group == "node":
        return GroupSpec("node")
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        return GroupSpec("outside")
    if isinstance(process_group, int) and not isinstance(process_group, bool):
        if process_group < 1:
            raise ValueError(
                f"process_group as an int is the number of ranks per group, at least 1; got {process_group}."
            )
        return GroupSpec("size", size=process_group)
    if isinstance(process_group, str):
        raise ValueError(f'process_group as a string must be "world" or "node", got {process_group!r}.')
    if hasattr(process_group, "mesh_dim_names"):  # DeviceMesh, without importing it where torch was built without
        if process_group.ndim != 1:
            names = process_group.mesh_dim_names
            hint = f"mesh[{names[0]!r}]" if names else "a mesh with mesh_dim_names and mesh[name]"
            raise ValueError(
                f"process_group as a DeviceMesh must have one dim, got {process_group.ndim} dims {names}. Pass {hint}."
            )
        process_group = process_group.get_group()
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return GroupSpec(
            "named", name=process_group.group_name, ranks=tuple(dist.get_process_group_ranks(process_group))
        )
    raise TypeError(
        'process_group must be None, "world", "node", an int, a ProcessGroup or a DeviceMesh, '
        f"got {type(process_group).__name__}."
    )


def resolve(spec: GroupSpec) -> Group:
    """The live group of this rank for ``spec``; :data:`LOCAL` where there is no default process group.

    Groups for ``"node"`` and for an int are made at the first call, which every rank of the world must reach; later calls
    find them again. Inside ``torch.compile`` the answer is taken when the graph is traced.

    Raises:
        SyncNormError: If this rank is outside the group, the group no longer exists, or this process is a fork of the rank.
        ValueError: If the world cannot be cut into groups of the asked size.
    """
    if torch.compiler.is_compiling():
        fields = spec.kind, spec.size, spec.name, spec.ranks  # Dynamo of torch 2.11 passes no dataclass on
        traced = Group(_traced_name(*fields), _traced_size(*fields))
        if not traced.name:
            collectives.has_world()  # read, and so guarded: a graph of one process is none of the world that comes later
        return traced
    group = _resolve(spec)
    if group.size > 1:
        collectives.refuse_inherited()
    return group


# Literals, which Dynamo writes into its graph: an object would be kept under a global name that a second compilation of the
# same code may lose.
@constant_while_traced
def _traced_name(*fields: Any) -> str:
    return _resolve(GroupSpec(*fields)).name


@constant_while_traced
def _traced_size(*fields: Any) -> int:
    return _resolve(GroupSpec(*fields)).size


def _resolve(spec: GroupSpec) -> Group:
    if spec.kind == "outside":
        raise SyncNormError(
            "this rank is outside the process group that the layer was given, so it cannot take part in its statistics. "
            "Give every rank that runs the layer a group that contains it (syncnorm.distributed.make_subgroups does)."
        )
    if not collectives.is_initialized():
        if spec.kind == "named":
            raise SyncNormError(_gone(spec))
        return LOCAL
    world = dist.group.WORLD
    assert world is not None
    if spec.kind == "world":
        return Group(world.group_name, world.size())
    if spec.kind == "named":
        if dist.get_rank() not in spec.ranks:
            raise SyncNormError(
                f"rank {dist.get_rank()} is outside the layer's process group of ranks {list(spec.ranks)}. "
                "Give every rank that runs the layer a group that contains it."
            )
        if collectives.group_ranks(spec.name) != spec.ranks:
            raise SyncNormError(_gone(spec))
        return Group(spec.name, len(spec.ranks))
    return _subgroup(spec)


def known(spec: GroupSpec) -> Group | None:
    """As :func:`resolve`, but meets nobody: None where the group would have to be made first."""
    if spec.kind not in ("node", "size") or not collectives.is_initialized():
        return _resolve(spec)
    name, members = _made.get(dist.group.WORLD, {}).get((dist.get_rank(), spec), ("", ()))
    return Group(name, len(members)) if members and collectives.group_ranks(name) == members else None


def make_subgroups(size: int | Literal["node"]) -> dist.ProcessGroup:
    """Cut the world into groups, in the same order on every rank, and give this rank its own.

    Every rank of the world must call this.

    Args:
        size: Ranks per group (consecutive ranks; must divide the world), or ``"node"`` for the ranks of one machine.

    Returns:
        The process group that contains this rank.

    Raises:
        ValueError: If ``size`` does not divide the world size.
        SyncNormError: If there is no default process group.
    """
    if not collectives.is_initialized():
        raise SyncNormError(
            "make_subgroups needs a default process group; call torch.distributed.init_process_group first."
        )
    return collectives.find_group(_subgroup(group_spec(size)).name)


# Per world, and in it per rank, as ranks may be threads. By the object and not by its name: the next world has the same
# name, and its groups may, too, but not on every rank, and to make groups is a meeting of all.
_made: WeakKeyDictionary[Any, dict[tuple[int, GroupSpec], tuple[str, tuple[int, ...]]]] = WeakKeyDictionary()


def _subgroup(spec: GroupSpec) -> Group:
    world = dist.group.WORLD
    assert world is not None
    made, key = _made.setdefault(world, {}), (dist.get_rank(), spec)
    name, members = made.get(key, ("", ()))
    if not members or collectives.group_ranks(name) != members:
        name, members = made[key] = _make(_partition(spec, world.group_name, world.size()))
    return Group(name, len(members))


def _make(partition: list[tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    mine: tuple[str, tuple[int, ...]] | None = None
    collectives.refuse_inherited()
    for members in partition:  # new_group is a meeting of the whole world: every rank makes every group
        group = dist.new_group(list(members))
        if dist.get_rank() in members:
            assert isinstance(group, dist.ProcessGroup)
            mine = (group.group_name, members)
    assert mine is not None
    return mine


def _partition(spec: GroupSpec, world_name: str, world_size: int) -> list[tuple[int, ...]]:
    if spec.kind == "size":
        if world_size % spec.size:
            raise ValueError(
                f"process_group={spec.size} must divide the number of ranks, which is {world_size}. "
                f"Divisors are {[k for k in range(1, world_size + 1) if world_size % k == 0]}."
            )
        return [tuple(range(start, start + spec.size)) for start in range(0, world_size, spec.size)]
    machine = torch.tensor([_machine_id()], dtype=torch.int64, device=collectives.group_device(world_name))
    machines: dict[int, list[int]] = {}
    identities = collectives.all_gather(machine, world_name, world_size)  # while a graph is traced, too
    for rank, identity in enumerate(identities.flatten().tolist()):
        machines.setdefault(identity, []).append(rank)
    return [tuple(members) for members in machines.values()]


def _machine_id() -> int:
    return int.from_bytes(hashlib.sha256(host().encode()).digest()[:7], "big")


def _gone(spec: GroupSpec) -> str:
    return (
        f"the layer's process group {spec.name!r} of ranks {list(spec.ranks)} does not exist here (any more). "
        'Create it before the first training step and set it again, or use process_group="world".'
    )
