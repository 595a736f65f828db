# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Kernels over channels: partial sums by tiles, the same in float64 over partials in a fixed order, and elementwise passes.

Group norm is the same with N·C channels of which groups share a mean and a deviation. Reductions walk memory forwards
and elementwise passes backwards, so that the second begins with what the first left in the L2 cache.
"""

# A tile is [ROWS, COLS]; see _tiles. A block is the channels of one tile, a split every splits-th tile of a block.

import triton
import triton.language as tl

from syncnorm.kernels.triton._activations import activate, affine, through
from syncnorm.kernels.triton._tiles import channels, load_bits, locate, offsets, spread, store_bits

__all__ = [
    "backward_input_kernel",
    "backward_reduce_kernel",
    "merge_kernel",
    "merged",
    "moments_kernel",
    "normalize_kernel",
    "sum_kernel",
]

# Or each new image size would compile kernels anew; what their alignment promises is said by ALIGN.
_SHAPES = ("C", "S", "tiles", "splits", "blocks", "steps", "num_channels", "num_stats")


@triton.jit(do_not_specialize=_SHAPES)
def moments_kernel(
    x, partial, C, S, tiles, splits, blocks, num_channels,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial moments, float64 [splits, 3 (count, mean, M2), channels].

    What is summed are deviations from the mean of the split's first tile. If that is D away from the mean of the split's
    T tiles, the variance is at least D²/T, so at most log2(T) bits are lost, whatever the data.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    width = (C if CHANNELS_LAST else S) // ALIGN * ALIGN
    within = offsets(width, ROWS, COLS)

    row, col, rows, cols = locate(split, block, C, S, ALIGN, CHANNELS_LAST, ROWS, COLS)
    mask = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLS)[None, :] < cols)
    v = tl.load(x + row * width + col + within, mask=mask, other=0.0).to(ACC)
    count = tl.minimum(rows, ROWS) if CHANNELS_LAST else tl.minimum(cols, COLS)
    pivot = tl.sum(v, AXIS) / count
    pivot_tile = spread(pivot, CHANNELS_LAST)
    d = tl.where(mask, v - pivot_tile, 0.0)
    total, squares = d, d * d
    for t in tl.range(split + splits, tiles, splits, num_stages=STAGES):
        row, col, rows, cols = locate(t, block, C, S, ALIGN, CHANNELS_LAST, ROWS, COLS)
        mask = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLS)[None, :] < cols)
        v = tl.load(x + row * width + col + within, mask=mask, other=0.0).to(ACC)
        d = tl.where(mask, v - pivot_tile, 0.0)
        total += d
        squares = tl.fma(d, d, squares)
        count += tl.minimum(rows, ROWS) if CHANNELS_LAST else tl.minimum(cols, COLS)

    n = count.to(tl.float64)
    shift = tl.sum(total, AXIS).to(tl.float64) / n
    m2 = tl.maximum(tl.sum(squares, AXIS).to(tl.float64) - shift * shift * n, 0.0)
    ids, exists = channels(block, C, CHANNELS_LAST, ROWS, COLS)
    out = partial + tl.cast(split, tl.int64) * 3 * num_channels + ids
    tl.store(out, tl.zeros_like(m2) + n, mask=exists)
    tl.store(out + num_channels, pivot.to(tl.float64) + shift, mask=exists)
    tl.store(out + 2 * num_channels, m2, mask=exists)


@triton.jit(do_not_specialize=["num_stats", "splits"])
def merge_kernel(
    partial, mean, spread_out, num_stats, group, splits,
    EPS: tl.constexpr, RSTD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Merge the partials of ``splits`` and of ``group`` adjacent channels: mean, and M2 or ``1/sqrt(M2/count + eps)``."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count, _, centre, m2 = merged(partial, ids, num_stats, group, splits, BLOCK, PARTS)
    tl.store(mean + ids, centre, mask=ids < num_stats)
    if RSTD:
        m2 = 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + EPS)
    tl.store(spread_out + ids, m2, mask=ids < num_stats)


@triton.jit
def merged(partial, ids, num_stats, group, splits, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Count, sum, mean and M2 of the stats ``ids``, each of ``splits`` partials of ``group`` adjacent channels."""
    parts = splits * group
    num_channels = num_stats * group
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part[:, None] < parts) & (ids[None, :] < num_stats)
        at = partial + (part // group)[:, None] * 3 * num_channels + ids[None, :] * group + (part % group)[:, None]
        n = tl.load(at, mask=mask, other=0.0)
        count += tl.sum(n, 0)
        total += tl.sum(n * tl.load(at + num_channels, mask=mask, other=0.0), 0)
    centre = total / tl.maximum(count, 1.0)
    m2 = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part[:, None] < parts) & (ids[None, :] < num_stats)
        at = partial + (part // group)[:, None] * 3 * num_channels + ids[None, :] * group + (part % group)[:, None]
        n = tl.load(at, mask=mask, other=0.0)
        d = tl.load(at + num_channels, mask=mask, other=0.0) - centre[None, :]
        m2 += tl.sum(tl.load(at + 2 * num_channels, mask=mask, other=0.0) + n * d * d, 0)
    return count, total, centre, m2


@triton.jit(do_not_specialize=_SHAPES)
def normalize_kernel(
    x, y, mean, rstd, weight, bias, residual, bits, C, S, tiles, blocks, steps, group, num_affine,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """``act((x - mean)·rstd·weight + bias + residual)``, and where ``bits`` is given whether the pre-activation is > 0."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program % blocks
    last = program // blocks * steps + steps - 1
    width = (C if CHANNELS_LAST else S) // ALIGN * ALIGN
    within = offsets(width, ROWS, COLS)
    centre, _, scale, shift = _vectors(
        mean, rstd, weight, bias, block, C, group, num_affine, ACC, CHANNELS_LAST, ROWS, COLS
    )  # fmt: skip
    for step in range(steps):
        t = last - step
        row, col, rows, cols = locate(t, block, C, S, ALIGN, CHANNELS_LAST, ROWS, COLS)
        rows = tl.where(t < tiles, rows, 0)
        mask = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLS)[None, :] < cols)
        at = row * width + col
        v = tl.load(x + at + within, mask=mask, other=0.0).to(ACC)
        pre = affine(v, centre, scale, shift)
        if residual is not None:
            pre += tl.load(residual + at + within, mask=mask, other=0.0).to(ACC)
        if bits is not None:
            store_bits(bits, (pre > 0) & mask, row, col, width, rows, cols, ROWS, COLS)
        tl.store(y + at + within, activate(pre, ACTIVATION, SLOPE).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SHAPES)
def backward_reduce_kernel(
    grad, x, partial, mean, rstd, weight, bias, residual, bits, C, S, tiles, splits, blocks, num_channels, group, num_affine,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial Σg' and Σg'·x̂, float64 [splits, 2, channels], with g' the gradient before the activation."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    width = (C if CHANNELS_LAST else S) // ALIGN * ALIGN
    within = offsets(width, ROWS, COLS)
    centre, _, scale, shift = _vectors(
        mean, rstd, weight, bias, block, C, group, num_affine, ACC, CHANNELS_LAST, ROWS, COLS
    )  # fmt: skip
    total = tl.zeros([ROWS, COLS], ACC)
    products = tl.zeros([ROWS, COLS], ACC)
    for t in tl.range(split, tiles, splits, num_stages=STAGES):
        row, col, rows, cols = locate(t, block, C, S, ALIGN, CHANNELS_LAST, ROWS, COLS)
        mask = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLS)[None, :] < cols)
        at = row * width + col
        v = tl.load(x + at + within, mask=mask, other=0.0).to(ACC)
        g = tl.load(grad + at + within, mask=mask, other=0.0).to(ACC)
        g = _before_activation(
            g, v, centre, scale, shift, residual, bits, at + within, mask, row, col, width, rows, cols,
            ACTIVATION, SLOPE, ROWS, COLS,
        )  # fmt: skip
        total += g
        products = tl.fma(g, v - centre, products)
    ids, exists = channels(block, C, CHANNELS_LAST, ROWS, COLS)
    out = partial + tl.cast(split, tl.int64) * 2 * num_channels + ids
    tl.store(out, tl.sum(total, AXIS).to(tl.float64), mask=exists)
    s = tl.load(rstd + ids // group, mask=exists)  # once more, or it spills over the loop
    tl.store(out + num_channels, tl.sum(products, AXIS).to(tl.float64) * s, mask=exists)


@triton.jit(do_not_specialize=["width", "parts"])
def sum_kernel(partial, out, width, parts, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Sum partials [parts, width] over the first dim, in float64 and in a fixed order."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part[:, None] < parts) & (ids[None, :] < width)
        total += tl.load(partial + part[:, None] * width + ids[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(out + ids, tl.sum(total, 0).to(out.dtype.element_ty), mask=ids < width)


@triton.jit(do_not_specialize=_SHAPES)
def backward_input_kernel(
    grad, x, dx, dresidual, mean, rstd, weight, bias, means, count, residual, bits, C, S, tiles, blocks, steps, num_stats,
    group, num_affine, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, WEIGHTED_MEANS: tl.constexpr,
):  # fmt: skip
    """``rstd·(weight·g' - ⟨g'⟩ - x̂⟨g'·x̂⟩)``, and g' itself for the residual.

    ``means`` [2, stats] are of weight·g' if WEIGHTED_MEANS (group norm), else of g' (the weight then stands before all);
    where a ``count`` is given they are sums yet, to be divided by it.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program % blocks
    last = program // blocks * steps + steps - 1
    width = (C if CHANNELS_LAST else S) // ALIGN * ALIGN
    within = offsets(width, ROWS, COLS)
    centre, s, scale, shift = _vectors(
        mean, rstd, weight, bias, block, C, group, num_affine, ACC, CHANNELS_LAST, ROWS, COLS
    )  # fmt: skip
    ids, exists = channels(block, C, CHANNELS_LAST, ROWS, COLS)
    factor = s
    if weight is not None and not WEIGHTED_MEANS:
        factor = s * tl.load(weight + ids % num_affine, mask=exists, other=0.0).to(tl.float64)
    if count is not None:
        factor = factor / tl.maximum(tl.load(count), 1.0)
    at_means = means + ids // group
    constant = factor * tl.load(at_means, mask=exists, other=0.0)
    slope_x = factor * s * tl.load(at_means + num_stats, mask=exists, other=0.0)
    constant = spread(constant.to(ACC), CHANNELS_LAST)
    slope_x = spread(slope_x.to(ACC), CHANNELS_LAST)
    for step in range(steps):
        t = last - step
        row, col, rows, cols = locate(t, block, C, S, ALIGN, CHANNELS_LAST, ROWS, COLS)
        rows = tl.where(t < tiles, rows, 0)
        mask = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLS)[None, :] < cols)
        at = row * width + col
        v = tl.load(x + at + within, mask=mask, other=0.0).to(ACC)
        g = tl.load(grad + at + within, mask=mask, other=0.0).to(ACC)
        g = _before_activation(
            g, v, centre, scale, shift, residual, bits, at + within, mask, row, col, width, rows, cols,
            ACTIVATION, SLOPE, ROWS, COLS,
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + at + within, g.to(dresidual.dtype.element_ty), mask=mask)
        out = tl.fma(
            centre - v, tl.broadcast_to(slope_x, v.shape), tl.fma(g, tl.broadcast_to(scale, v.shape), -constant)
        )
        tl.store(dx + at + within, out.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _vectors(
    mean, rstd, weight, bias, block, C, group, num_affine, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What a block's channels are normalised by, to broadcast over a tile; and their rstd as a float64 vector."""
    ids, exists = channels(block, C, CHANNELS_LAST, ROWS, COLS)
    s = tl.load(rstd + ids // group, mask=exists, other=0.0).to(tl.float64)
    scale = s
    shift = tl.zeros_like(s)
    if weight is not None:
        scale = s * tl.load(weight + ids % num_affine, mask=exists, other=0.0).to(tl.float64)
    if bias is not None:
        shift = tl.load(bias + ids % num_affine, mask=exists, other=0.0).to(tl.float64)
    centre = tl.load(mean + ids // group, mask=exists, other=0.0)
    return (
        spread(centre.to(ACC), CHANNELS_LAST), s,
        spread(scale.to(ACC), CHANNELS_LAST), spread(shift.to(ACC), CHANNELS_LAST),
    )  # fmt: skip


@triton.jit
def _before_activation(
    g, v, centre, scale, shift, residual, bits, at, mask, row, col, width, rows, cols,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation: through a mask of bits, or through the pre-activation formed anew."""
    if ACTIVATION == 0:
        return g
    elif bits is not None:
        return through(g, g, load_bits(bits, row, col, width, rows, cols, ROWS, COLS), ACTIVATION, SLOPE)
    else:
        pre = affine(v, centre, scale, shift)
        if residual is not None:
            pre += tl.load(residual + at, mask=mask, other=0.0).to(v.dtype)
        return through(g, pre, pre > 0, ACTIVATION, SLOPE)
