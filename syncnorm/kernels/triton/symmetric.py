# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""One row of each rank summed by one kernel, over memory that the GPUs of one NVLink domain have in common.

Every rank writes its row into a slot that every other rank keeps for it, says so there with the number of the exchange, waits
until all have said it here, and adds up its slots in the order of the ranks: all get the same bits. Two sets of slots and
numbers take turns, so that nobody waits at the end: who writes number k + 2 has seen everyone's k + 1, and who says k + 1 has
read all of k. Programs of a launch share nothing; each has numbers of its own, kept on the device, where a
CUDA graph finds them, too.
"""

# R ranks, B blocks of a row

import triton
import triton.language as tl
from torch import Tensor

from syncnorm.kernels.triton._launch import launch

__all__ = ["BLOCK", "CAPACITY", "LATE", "UNEQUAL", "length", "symmetric_sum"]

BLOCK = 1024  # words of a program
CAPACITY = 8192  # words of a slot; longer rows go in pieces
LATE, UNEQUAL = 1, 2  # what a status word says beside the rank: it has not come, or its row has another length
_BLOCKS = CAPACITY // BLOCK
_LENGTHS = 2**24  # more than any row's


def length(ranks: int) -> int:
    """Words of 8 bytes that a rank lends to the others: numbers int64 [2, B, R], then slots float64 [2, R, CAPACITY]."""
    return 2 * _BLOCKS * ranks + 2 * ranks * CAPACITY


def symmetric_sum(
    row: Tensor, table: Tensor, turns: Tensor, status: Tensor, rank: int, ranks: int, patience: int
) -> None:
    """Sum ``row`` over the ranks, in place; NaN where one did not come or brought a row of another length.

    Args:
        row: float64 ``[n]``, contiguous.
        table: int64 ``[R]``: where the memory of each rank lies for this one.
        turns: int64 ``[B]``, zero at first: the number of this rank's last exchange, by block.
        status: int64 ``[1]``, zero at first, where the host can look without waiting: 4·rank + LATE or UNEQUAL once
            something has failed. Then nothing is waited for any more.
        rank: This rank.
        ranks: R.
        patience: How often to look for a rank before it counts as late.
    """
    n = row.numel()
    for start in range(0, max(n, 1), CAPACITY):
        words = min(n - start, CAPACITY)
        piece = row[start : start + words] if n else table  # an empty row says that it is empty, and touches nothing
        launch(
            _sum, max(1, -(-words // BLOCK)), piece, table, turns, status, words, n, rank, patience,
            RANKS=ranks, BLOCK_WORDS=BLOCK, SLOT=CAPACITY, BLOCKS=_BLOCKS, LENGTHS=_LENGTHS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["words", "total", "rank", "patience"])
def _sum(
    row, table, turns, status, words, total, rank, patience,
    RANKS: tl.constexpr, BLOCK_WORDS: tl.constexpr, SLOT: tl.constexpr, BLOCKS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    at = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = at < words
    turn = tl.load(turns + block) + 1
    said = turn * LENGTHS + total
    numbers = ((turn % 2) * BLOCKS + block) * RANKS
    slots = 2 * BLOCKS * RANKS + (turn % 2) * RANKS * SLOT
    mine = tl.load(row.to(tl.pointer_type(tl.float64)) + at, mask=inside, other=0.0)
    for peer in tl.static_range(RANKS):
        theirs = tl.load(table + peer).to(tl.pointer_type(tl.float64))
        tl.store(theirs + slots + rank * SLOT + at, mine, mask=inside)
    tl.debug_barrier()  # what all threads have stored is said by one
    for peer in tl.static_range(RANKS):
        number = tl.load(table + peer).to(tl.pointer_type(tl.int64)) + numbers + rank
        tl.atomic_xchg(number, said, sem="release", scope="sys")
    own = tl.load(table + rank)
    failed = tl.load(status, volatile=True)
    for peer in tl.static_range(RANKS):
        number = own.to(tl.pointer_type(tl.int64)) + numbers + peer
        heard = tl.atomic_add(number, 0, sem="acquire", scope="sys")
        looks = patience * 0
        while (heard < turn * LENGTHS) & (looks < patience) & (failed == 0):
            heard = tl.atomic_add(number, 0, sem="acquire", scope="sys")
            failed = tl.load(status, volatile=True)
            looks += 1
        if (heard != said) & (failed == 0):
            failed = 4 * peer + 2 - (heard < turn * LENGTHS).to(tl.int64)
    here = own.to(tl.pointer_type(tl.float64)) + slots
    sums = tl.load(here + at, mask=inside, other=0.0, volatile=True)
    for peer in tl.static_range(1, RANKS):
        sums += tl.load(here + peer * SLOT + at, mask=inside, other=0.0, volatile=True)
    if failed != 0:
        sums = sums * float("nan")
        tl.store(status, failed)
    tl.store(row.to(tl.pointer_type(tl.float64)) + at, sums, mask=inside)
    tl.store(turns + block, turn)
