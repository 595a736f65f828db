"""The only file that spells torch's collective names.

Eager calls use the plain in-place collective (on gloo the functional one costs a third more: 381 against 302 µs for one
small row); a traced call uses the functional one, which torch.compile can keep in one graph.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "all_reduce_sum", "find_group", "group_device", "group_ranks", "is_initialized"]


def is_initialized() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def find_group(name: str) -> dist.ProcessGroup:
    """The process group of that name.

    Raises:
        RuntimeError: If there is none, or no longer.
    """
    resolve: Callable[[str], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group  # type: ignore[assignment, unused-ignore]
    return resolve(name)


def group_ranks(name: str) -> tuple[int, ...]:
    """Global ranks of the named group, ascending; empty if there is no such group."""
    try:
        return tuple(dist.get_process_group_ranks(find_group(name)))
    except (RuntimeError, ValueError, KeyError):
        return ()


def group_device(name: str) -> torch.device:
    """A device that the named group can exchange tensors on: CPU where it can, else the current accelerator."""
    devices = find_group(name)._device_types
    if any(device.type == "cpu" for device in devices):
        return torch.device("cpu")
    return torch.device(devices[0].type, torch.accelerator.current_device_index())


def all_reduce_sum(row: Tensor, name: str) -> Tensor:
    """Sum ``row`` over the ranks of the named group; may reuse its memory."""
    if torch.compiler.is_compiling():
        pending = torch.ops._c10d_functional.all_reduce(row, "sum", name)
        return torch.ops._c10d_functional.wait_tensor(pending)  # type: ignore[no-any-return]
    dist.all_reduce(row, op=dist.ReduceOp.SUM, group=find_group(name))
    return row


def all_gather(row: Tensor, name: str, size: int | None = None) -> Tensor:
    """Stack the rows of all ranks of the named group along a new leading dim; a traced call must know their number."""
    if torch.compiler.is_compiling():
        pending = torch.ops._c10d_functional.all_gather_into_tensor(row.unsqueeze(0), size, name)
        return torch.ops._c10d_functional.wait_tensor(pending)  # type: ignore[no-any-return]
    group = find_group(name)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return torch.stack(rows)
