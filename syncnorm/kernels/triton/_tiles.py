# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""How a kernel walks a flat tensor: in tiles of rows by columns, columns innermost in memory, whatever the layout.

Channels first, ``[N, C, S]``: a tile is some channels by a run of space, and its channels lie along its rows. Channels
last, ``[instance, S, C]``: a tile is some positions by a run of channels, and its channels lie along its columns.
"""

import triton
import triton.language as tl

__all__ = ["channels", "load_bits", "locate", "offsets", "spread", "store_bits"]


@triton.jit
def locate(t, block, C, S, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where tile ``t`` of a block of channels lies: first row (int64), first column, and how many of each are left."""
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, COLS)
        first = tl.cast(t, tl.int64) * ROWS
        row = tl.cast(block // blocks, tl.int64) * S + first
        rows = S - first
        col = block % blocks * COLS
        cols = C - col
    else:
        steps = tl.cdiv(S, COLS)
        row = tl.cast(t // steps, tl.int64) * C + block * ROWS
        rows = C - block * ROWS
        col = t % steps * COLS
        cols = S - col
    return row, col, rows, cols // ALIGN * ALIGN


@triton.jit
def offsets(width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets within a tile [ROWS, COLS] of a tensor with ``width`` columns."""
    return tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLS)[None, :]


@triton.jit
def channels(block, C, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The channels of a block, numbered over all instances, and which of them exist."""
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, COLS)
        local = block % blocks * COLS + tl.arange(0, COLS)
        return block // blocks * C + local, local < C
    else:
        local = block * ROWS + tl.arange(0, ROWS)
        return local, local < C


@triton.jit
def spread(v, CHANNELS_LAST: tl.constexpr):
    """A vector over channels as it broadcasts over a tile."""
    if CHANNELS_LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def store_bits(bits, flags, row, col, width, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write a tile of 0 and 1, eight columns a byte, lowest bit first; rows of bytes are padded to whole bytes."""
    bytes_wide = tl.cdiv(width, 8)
    shifts = tl.arange(0, 8)[None, None, :]
    packed = tl.sum(tl.reshape(flags.to(tl.int32), [ROWS, COLS // 8, 8]) << shifts, 2).to(tl.uint8)
    r, b = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS // 8)[None, :]
    tl.store(bits + row * bytes_wide + col // 8 + r * bytes_wide + b, packed, mask=(r < rows) & (b * 8 < cols))


@triton.jit
def load_bits(bits, row, col, width, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile that :func:`store_bits` wrote, as booleans."""
    bytes_wide = tl.cdiv(width, 8)
    r, b = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS // 8)[None, :]
    packed = tl.load(bits + row * bytes_wide + col // 8 + r * bytes_wide + b, mask=(r < rows) & (b * 8 < cols), other=0)
    single = packed.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(single, [ROWS, COLS]) != 0
