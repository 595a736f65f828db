"""Tile sizes and grids: plain numbers from shapes, no triton here.

None has been timed yet. They follow from bytes in flight: 16-byte accesses, 64 bytes a thread, four warps, so that a few
programs give a multiprocessor more than the 16 KiB in flight that 3 TB/s at 700 ns ask of it. Reductions keep sums in most of
their registers and fit three to nine times (of half precision the fewer); what they fetch ahead keeps 48 KiB on the way.
"""

# N batch, C channels, S space; rows and columns of a tile as in _tiles

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "Walk", "multiprocessors", "plan_row_weights", "plan_rows", "plan_walk", "power_of_two"]

TILE_BYTES = 8192  # in all tensors of a tile, counted up to two: 64 bytes for each thread of 4 warps
CHANNELS_LAST_BYTES = 256  # of channels in a row of a channels-last tile
NARROW_TILE = (
    1024  # values of an elementwise tile of maps like 7x7, whose accesses are narrow: 64 instructions a value, not 116
)
PROGRAMS_PER_MULTIPROCESSOR = 8
TILES_PER_SPLIT = 4  # at least, or writing the partials would show beside reading the tensor
FORWARD_ROW = 16384  # features that a program holds in registers, half as many in float64
BACKWARD_ROW = 8192  # the same with two sums beside them: at 16384 they spill
ROW_TILE = 2048  # features of several short rows in one tile
BACKWARD_TILE = 1024  # the same for the backward, whose pointers and sums would not fit ROW_REGISTERS
ROW_CHUNK = 4096  # features of a long row at a time
ROW_REGISTERS = (
    128  # of a thread of the rows' backward, so that its 16 warps a multiprocessor run at once; spills nothing
)
SHARED_BYTES = 96 << 10  # of two programs' prefetched tiles: what the smallest multiprocessors since 8.0 have
REDUCE_STAGES = 3  # of a reduction over tiles: two are on their way into shared memory while one is added up
STEPS = 8  # tiles of one elementwise program where a tile has many channels, so that their vectors are read once


class Walk(NamedTuple):
    """How kernels walk a flat tensor.

    Attributes:
        C: Channels of an instance: of a sample for group norm in channels-last, else of everything.
        S: Values per channel of one sample; of one instance in channels-last.
        channels_last: Whether channels are innermost.
        align: Power of two that divides the innermost size, at most 16 bytes.
        rows: Rows of a tile.
        cols: Columns of a tile.
        tiles: Tiles of one block of channels.
        blocks: Blocks of channels, over all instances.
        num_channels: Channels over all instances.
        splits: Programs that share a block in a reduction.
        steps: Tiles of one program in an elementwise pass.
        warps: Warps of a program.
        stages: Of the loop over tiles of a reduction. More than 1 fetch ahead, by accesses of 4 bytes at least.
    """

    C: int
    S: int
    channels_last: bool
    align: int
    rows: int
    cols: int
    tiles: int
    blocks: int
    num_channels: int
    splits: int
    steps: int
    warps: int
    stages: int


def plan_walk(x: Tensor, *, tensors: int, reduces: bool = False) -> Walk:
    """A walk over ``tensors`` tensors like flat ``x``: [N, C, S] contiguous, [M, C], or [N, C, S] with strides (S·C, 1, C)."""
    knobs = (
        TILE_BYTES, CHANNELS_LAST_BYTES, NARROW_TILE, PROGRAMS_PER_MULTIPROCESSOR, TILES_PER_SPLIT, REDUCE_STAGES, STEPS
    )  # fmt: skip
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device)
    return _walk(
        tuple(map(int, x.shape)), x.is_contiguous(), x.element_size(), min(tensors, 2), reduces, programs, knobs
    )


@lru_cache(maxsize=1024)  # found four times a layer and step, at 10 µs each
def _walk(
    shape: tuple[int, ...], contiguous: bool, size: int, tensors: int, reduces: bool, programs: int, knobs: tuple[int, ...]
) -> Walk:  # fmt: skip
    """``knobs`` are the constants that it reads, so that a walk is planned anew where one of them has been changed."""
    if len(shape) == 2:
        instances, channels_last, (S, C) = 1, True, shape
    else:
        instances, C, S = shape
        channels_last = not contiguous
    inner, outer = (C, S) if channels_last else (S, C)
    align = _power_of_two_in(inner, 16 // size)
    elements = TILE_BYTES // (size * tensors)
    narrow = not (channels_last or reduces) and align * size < 16
    if narrow:
        elements = min(elements, NARROW_TILE)
    cols = max(8, min(power_of_two(inner), CHANNELS_LAST_BYTES // size if channels_last else elements))
    rows = max(1, min(power_of_two(outer), elements // cols))
    if channels_last:
        tiles, blocks = -(-S // rows), -(-C // cols) * instances
    else:
        tiles, blocks = instances * -(-S // cols), -(-C // rows)
    return Walk(
        C=C,
        S=S,
        channels_last=channels_last,
        align=align,
        rows=rows,
        cols=cols,
        tiles=tiles,
        blocks=blocks,
        num_channels=C * instances if channels_last else C,
        splits=max(1, min(programs // blocks, -(-tiles // TILES_PER_SPLIT))),
        steps=1 if rows == 1 else max(1, min(STEPS, tiles, tiles * blocks // programs)),
        warps=max(1, min(2 if narrow else 4, rows * cols * size // 1024)),
        stages=REDUCE_STAGES if align * size >= 8 else 1,
    )


class Rows(NamedTuple):
    """How row kernels walk [M, D].

    Attributes:
        rows: Rows of a tile.
        cols: Columns of a tile.
        align: Power of two that divides D, at most 16 bytes.
        warps: Warps of a program.
        whole: Whether a tile holds whole rows.
        programs: Programs that share the rows, where each walks many.
        stages: Of the loop over rows: 2 or 3 fetch the next tiles into shared memory while this one is worked on.
    """

    rows: int
    cols: int
    align: int
    warps: int
    whole: bool
    programs: int
    stages: int


def plan_rows(x: Tensor, *, backward: bool) -> Rows:
    """A walk over rows ``x`` [M, D]."""
    M, D = map(int, x.shape)
    whole = (BACKWARD_ROW if backward else FORWARD_ROW) // (2 if x.dtype == torch.float64 else 1) >= D
    cols = max(8, power_of_two(D)) if whole else ROW_CHUNK
    small = backward and cols <= BACKWARD_TILE
    rows = max(1, min(power_of_two(M), (BACKWARD_TILE if small else ROW_TILE) // cols))
    warps = max(1, min(16, rows * cols // (256 if small else 512)))
    at_once = max(1, 16 // warps)
    fetched = rows * cols * 3 * x.element_size() + cols * 4
    stages = 1 + min(2, SHARED_BYTES // max(1, at_once // 2) // fetched) if whole else 1
    programs = multiprocessors(x.device) * at_once
    align = _power_of_two_in(D, 16 // x.element_size())
    return Rows(rows, cols, align, warps, whole, min(programs, -(-M // rows)), stages)


def plan_row_weights(x: Tensor) -> Rows:
    """A walk over ``x`` [M, D] by columns, for what is summed over rows."""
    M, D = map(int, x.shape)
    size = x.element_size()
    cols = CHANNELS_LAST_BYTES // size
    rows = max(1, min(power_of_two(M), TILE_BYTES // 2 // size // cols))
    programs = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device) * cols // D)
    tiles = -(-M // rows)
    splits = max(1, min(programs, -(-tiles // TILES_PER_SPLIT)))
    return Rows(rows, cols, _power_of_two_in(D, 16 // size), 4, False, splits, 1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not smaller than ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _power_of_two_in(n: int, most: int) -> int:
    return min(n & -n, most)


def multiprocessors(device: torch.device) -> int:
    """Of the device. Two under the interpreter, so that reductions split there too; an H100's for a device elsewhere."""
    return 2 if device.type == "cpu" else _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
