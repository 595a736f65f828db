"""Whether the norms of a model are the same bits on every rank, where they part if not, and what to do about it.

Sound ranks exchange three words. Only where those differ, digests of every tensor are gathered, and then the values of the
tensors that differ; each gather has a length that all ranks know, so ranks with different models meet and are told.
"""

# R ranks, T tensors, V values

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncnorm.conversion._layers import SHARDED, class_names, display, find_layers
from syncnorm.conversion._select import Patterns, select
from syncnorm.conversion._validate import is_norm
from syncnorm.diagnostics._audit_report import AuditReport, Drift
from syncnorm.distributed.collectives import group_position, group_ranks
from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import Group, GroupSpec, group_spec, resolve
from syncnorm.errors import SyncNormError, SyncNormMismatch
from syncnorm.modules._pool_statistics import STATISTICS, pool_statistics

__all__ = ["audit"]

_TEXT = 256  # bytes of a name on the wire

# Ranks that should agree, as the sides that do: positions in the group, the side with the lowest first.
_Circle: TypeAlias = list[list[int]]


class _Item(NamedTuple):
    """A tensor with where it is."""

    layer: str
    name: str
    module: nn.Module
    tensor: Tensor

    def __str__(self) -> str:
        return f"{display(self.layer)}.{self.name} {list(self.tensor.shape)} {self.tensor.dtype}"


@torch.no_grad()
def audit(
    model: nn.Module,
    repair: Literal["raise", "broadcast", "pool"] = "raise",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    process_group: object = "world",
) -> AuditReport:
    """Compare buffers and parameters of all norms over ranks, bit for bit, and repair or name what differs.

    Buffers of a layer that shares its statistics over a smaller group are compared within that group. Parameters that are
    sharded (FSDP, tensor parallel) are left out. Plain batch norms do drift while they train, also under DDP, which
    broadcasts their buffers before the next forward: convert or :func:`syncnorm.reduce_buffers` first, or ``exclude`` them.

    Every rank must call this between two steps. Where all is well it is one gather of 2 kB and a digest of each tensor's
    bytes, on the host.

    Args:
        model: Any model, wrapped or not.
        repair: What to do about a difference. ``"raise"``: :class:`SyncNormMismatch` on every rank. ``"broadcast"``: take
            the tensors that differ from the lowest rank of those compared. ``"pool"``: running statistics become those of
            all ranks' data, as :func:`syncnorm.reduce_buffers` has it; other tensors cannot be pooled, and raise.
        include: Compare only these layers; globs, types or predicates, as in :func:`syncnorm.convert`.
        exclude: Leave these out.
        process_group: The ranks to compare, as in :class:`syncnorm.SyncBatchNorm`.

    Returns:
        An :class:`AuditReport`; ``print`` it. After a repair it tells what was repaired.

    Raises:
        SyncNormMismatch: With ``repair="raise"`` if a tensor differs: naming the first layer, tensor and channel, the ranks
            on each side and their values. With ``"pool"`` if something differs that is no running statistic. In any case if
            ranks have different norms. Nothing has changed then.
        ValueError: For another ``repair``, or a pattern that matches nothing.

    Example:
        >>> print(syncnorm.audit(torch.nn.BatchNorm1d(8)))
        5 tensors of norms over ranks [0]: the same bits on all
    """
    if repair not in ("raise", "broadcast", "pool"):
        raise ValueError(f'repair must be "raise", "broadcast" or "pool", got {repair!r}.')
    items = list(_items(model, include, exclude))
    group = resolve(group_spec(process_group))
    ranks = group_ranks(group.name) or (0,)
    kinds = [_digest(str(item).encode()) for item in items]
    digests = [_digest(_bytes(item.tensor)) for item in items]
    words = (len(items), _digest(repr(kinds).encode()), _digest(repr(digests).encode()))
    heads = gather_rows(torch.tensor(words), group)
    if (heads[:, :2] != heads[0, :2]).any():
        raise SyncNormMismatch(_different_models(items, kinds, int(heads[:, 0].max()), ranks, group))
    if (heads == heads[0]).all():
        return AuditReport((), len(items), ranks)

    circles = _circles(items, digests, group)
    values = _gather_values([items[t].tensor for t in circles], group)
    drifts = tuple(_drift(items[t], circles[t], rows, ranks) for t, rows in zip(circles, values, strict=True))
    report = AuditReport(drifts, len(items), ranks, repaired=repair if drifts and repair != "raise" else None)
    if drifts and repair == "raise":
        raise SyncNormMismatch(
            f'{report}. Nothing was changed. repair="broadcast" would take what the lowest rank has, repair="pool" pools '
            "running statistics."
        )
    if repair == "pool":
        _pool([items[t] for t in circles], group, drifts)
    else:
        for t, rows in zip(circles, values, strict=True):
            _take_lowest(items[t].tensor, circles[t], rows, group_position(group.name))
    return report


def _items(model: nn.Module, include: Patterns, exclude: Patterns) -> Iterator[_Item]:
    layers = find_layers(model, is_norm)
    included = select(model, layers, "include", include)
    excluded = select(model, layers, "exclude", exclude)
    sharded = any(class_names(module) & SHARDED for module in model.modules())
    for layer in layers:
        module = layer.module
        if id(module) in excluded or (include is not None and id(module) not in included):
            continue
        for name, tensor in {**({} if sharded else module._parameters), **module._buffers}.items():
            if tensor is not None and not (is_lazy(tensor) or tensor.is_meta or hasattr(tensor, "to_local")):
                yield _Item(layer.short_names[0], name, module, tensor)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()


def _digest(data: Any) -> int:
    """64 bits of ``data``, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _different_models(items: list[_Item], kinds: list[int], most: int, ranks: tuple[int, ...], group: Group) -> str:
    """Which tensor is the first that ranks do not have alike, and what each of them has there."""
    rows = gather_rows(torch.tensor([*kinds, *[0] * (most - len(kinds))]), group)
    t = int((rows != rows[0]).any(0).nonzero()[0])
    mine = (str(items[t]) if t < len(items) else "nothing").encode()[:_TEXT].ljust(_TEXT)
    rows = gather_rows(torch.frombuffer(bytearray(mine), dtype=torch.int64), group)
    sides: dict[str, list[int]] = {}
    for rank, row in zip(ranks, rows, strict=True):  # names from other ranks are text to show and nothing else
        text = row.numpy().tobytes().decode(errors="replace").rstrip()
        sides.setdefault("".join(c if c.isprintable() else "?" for c in text), []).append(rank)
    found = "; ".join(f"ranks {who} have {what}" for what, who in sides.items())
    return (
        f"ranks must have the same norms in the same order, and part at tensor {t}: {found}. Build and convert the model alike "
        "on all ranks. Nothing was changed."
    )


def _circles(items: list[_Item], digests: list[int], group: Group) -> dict[int, list[_Circle]]:
    """By position of a tensor that differs within one of its circles: all of them."""
    row = torch.tensor([*digests, *(_circle_id(item) for item in items)])
    found: dict[int, list[_Circle]] = {}
    for t, column in enumerate(gather_rows(row, group).view(group.size, 2, -1).permute(2, 0, 1).tolist()):
        circles: dict[int, dict[int, list[int]]] = {}
        for position, (digest, circle) in enumerate(column):
            circles.setdefault(circle, {}).setdefault(digest, []).append(position)
        if any(len(sides) > 1 for sides in circles.values()):
            found[t] = [list(sides.values()) for sides in circles.values()]
    return found


def _circle_id(item: _Item) -> int:
    """Equal for the ranks that should hold the same: those of the layer's group for its statistics, else all."""
    own = _own_group(item.module) if item.name in item.module._buffers else None
    return 0 if own is None else _digest(repr(group_ranks(own.name)).encode())


def _own_group(module: nn.Module) -> Group | None:
    """The group of a layer that has another one than the world."""
    spec = getattr(module, "_group_spec", None)
    if not isinstance(spec, GroupSpec) or spec.kind in ("world", "outside"):
        return None
    try:
        return resolve(spec)
    except SyncNormError:  # a training forward says so
        return None


def _gather_values(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """Of each tensor the values on all ranks, float64 ``[R, V]``: exact for every dtype that norms have."""
    flat = [tensor.detach().flatten().cpu().double() for tensor in tensors]
    rows = gather_rows(torch.cat([torch.zeros(0, dtype=torch.float64), *flat]), group)
    return list(rows.split([values.numel() for values in flat], dim=1))


def _drift(item: _Item, circles: list[_Circle], rows: Tensor, ranks: tuple[int, ...]) -> Drift:
    sides = next(sides for sides in circles if len(sides) > 1)
    rows = rows[[side[0] for side in sides]]
    first = int((rows.view(torch.int64) != rows[0].view(torch.int64)).any(0).int().argmax())
    return Drift(
        layer=item.layer,
        tensor=item.name,
        parties=tuple(tuple(ranks[position] for position in side) for side in sides),
        channel=first // (item.tensor.numel() // item.tensor.size(0)) if item.tensor.dim() else None,
        values=tuple(rows[:, first].tolist()),
        largest=float((rows - rows[0]).abs().max()),
    )


def _take_lowest(tensor: Tensor, circles: list[_Circle], rows: Tensor, position: int) -> None:
    right = next(sides for sides in circles if any(position in side for side in sides))[0]
    if position not in right:
        tensor.copy_(rows[right[0]].view_as(tensor))


def _pool(items: list[_Item], group: Group, drifts: tuple[Drift, ...]) -> None:
    others = [drift for drift, item in zip(drifts, items, strict=True) if item.name not in STATISTICS]
    if others:
        raise SyncNormMismatch(
            f'repair="pool" is for {", ".join(STATISTICS)}, and {others[0]}. Nothing was changed. repair="broadcast" takes '
            "what the lowest rank has."
        )
    by_group: dict[Group, dict[str, nn.Module]] = {}
    for item in items:
        by_group.setdefault(_own_group(item.module) or group, {})[item.layer] = item.module
    for its_group, layers in by_group.items():
        pool_statistics(layers, its_group)
