"""Rows summed by one kernel over memory that GPUs lend each other (torch's symmetric memory), within one NVLink domain.

Taken only where it is asked for by name: its protocol is tested with interpreted kernels in processes on CPU, and nothing of
it has run on two GPUs yet.
"""

import torch
from torch import Tensor

from syncnorm.distributed.collectives import find_group
from syncnorm.errors import SyncNormMismatch, SyncNormTimeout
from syncnorm.kernels import triton

__all__ = ["Symmetric", "join", "objection"]

_LOOKS = 1_000_000  # of a waiting program in a second, about


def objection() -> str | None:
    """Why the GPU of this rank cannot lend memory to others, in a sentence."""
    if not torch.cuda.is_available():
        return "there is no CUDA device."
    try:
        from torch.distributed import _symmetric_memory as memory
    except ImportError:
        return f"torch {torch.__version__} has no symmetric memory."
    if not hasattr(memory, "rendezvous"):
        return f"torch {torch.__version__} knows symmetric memory in an older form."
    return triton.objection(torch.empty(0, dtype=torch.float64, device="cuda"))


class Symmetric:
    """One group's lent memory, and the exchange over it, in the order of one stream; all ranks make the same calls.

    Args:
        table: int64 ``[R]``: where the memory of each rank lies for this one; zeros at first on all of them.
        memory: Whatever keeps that memory alive.
        rank: This rank's place in the group.
        members: Global ranks of the group.
        timeout: Seconds, about, after which a rank counts as late.
    """

    def __init__(self, table: Tensor, memory: object, rank: int, members: tuple[int, ...], timeout: float) -> None:
        from syncnorm.kernels.triton import symmetric as kernel

        self._kernel, self._table, self._memory = kernel, table, memory
        self._rank, self._members, self._timeout = rank, members, timeout
        self._turns = torch.zeros(kernel.CAPACITY // kernel.BLOCK, dtype=torch.int64, device=table.device)
        status = torch.zeros(1, dtype=torch.int64)
        self._status = status.pin_memory() if table.is_cuda else status  # the host looks without waiting
        self._seen = self._status.numpy()

    def sum(self, row: Tensor) -> Tensor:
        """Sum ``row`` (float64, contiguous) over the ranks, in place; the same bits on all of them.

        What fails makes the row NaN, on the device, and raises at the next call, as the host does not wait for it.

        Raises:
            SyncNormTimeout: If a rank did not come to an earlier exchange.
            SyncNormMismatch: If one brought a row of another length to an earlier exchange.
        """
        if code := int(self._seen[0]):
            self._raise(code)
        self._kernel.symmetric_sum(
            row, self._table, self._turns, self._status, self._rank, len(self._members), int(self._timeout * _LOOKS)
        )
        return row

    def settle(self) -> None:
        """Wait for what is under way, and raise what has failed."""
        if self._table.is_cuda:
            torch.cuda.synchronize(self._table.device)
        if code := int(self._seen[0]):
            self._raise(code)

    def _raise(self, code: int) -> None:
        place, what = divmod(code, 4)
        rank = self._members[place]
        then = (
            "Found out later, to keep the device from waiting: rows since then are NaN. Make the process group again."
        )
        if what == self._kernel.UNEQUAL:
            raise SyncNormMismatch(f"rank {rank} brought a row of another length than this rank to an exchange. {then}")
        raise SyncNormTimeout(f"rank {rank} did not come to an exchange within about {self._timeout:g} s. {then}")


def join(name: str, place: int, members: tuple[int, ...], timeout: float) -> Symmetric:
    """Lend memory to the ranks of the named group and borrow theirs; all of them call this.

    Raises:
        RuntimeError: If the GPUs cannot reach each other, or a first sum is wrong.
    """
    from torch.distributed import _symmetric_memory as lent

    from syncnorm.kernels.triton import symmetric as kernel

    size, device = len(members), torch.device("cuda", torch.cuda.current_device())
    memory = lent.empty(kernel.length(size), dtype=torch.int64, device=device).zero_()
    handle = lent.rendezvous(memory, find_group(name))
    handle.barrier()  # all memory is zero before anybody writes into it
    lies = [handle.get_buffer(r, (1,), torch.int64).data_ptr() for r in range(size)]
    # torch 2.11 lends from a pool, and what it then tells is where the whole pool lies.
    within = memory.data_ptr() - lies[place]
    table = torch.tensor([start + within for start in lies], device=device)
    wire = Symmetric(table, (memory, handle), place, members, timeout)
    probe = wire.sum(torch.tensor([1.0, 2.0**place], dtype=torch.float64, device=device))
    wire.settle()
    if probe.tolist() != [size, 2.0**size - 1]:
        raise RuntimeError(f"a first sum over {size} ranks gave {probe.tolist()}")
    return wire
