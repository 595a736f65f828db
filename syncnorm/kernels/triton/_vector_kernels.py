# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Kernels over the vectors of a layer, between its passes over the data: moments, running statistics, what ranks exchange.

On an accelerator each of torch's operations costs a launch. A forward and backward among ranks took 40 of them, and takes
eight with these: four kernels here and four over the data.
"""

# C channels. A number of the host that must stay exact comes as the bits of its float64: triton's interpreter would round it.

import triton
import triton.language as tl

from syncnorm.kernels.triton._batch_kernels import merged

__all__ = ["finish_moments_kernel", "finish_sums_kernel", "read_moments_kernel", "update_running_kernel"]

_WORDS = ("w0", "w1", "w2", "w3", "w4", "w5")


@triton.jit(do_not_specialize=["C", "splits", "width", *_WORDS])
def finish_moments_kernel(
    partial, mean, m2, rstd, written_count, row, C, splits, width,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64,
    EPS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the partials of ``splits``: mean, M2, ``1/sqrt(var + eps)`` and count, or the row ``[count, n·μ, M2 + n·μ²]``."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = ids < C
    count, total, centre, spread = merged(partial, ids, C, 1, splits, BLOCK, PARTS)
    if row is None:
        tl.store(mean + ids, centre, mask=exists)
        tl.store(m2 + ids, spread, mask=exists)
        tl.store(rstd + ids, 1.0 / tl.sqrt(spread / tl.maximum(count, 1.0) + EPS), mask=exists)
        if written_count is not None:
            tl.store(written_count + ids * 0, count, mask=ids == 0)
    else:
        tl.store(row + ids * 0, count, mask=ids == 0)
        tl.store(row + 1 + ids, total, mask=exists)
        tl.store(row + 1 + C + ids, tl.fma(total, centre, spread), mask=exists)
        _end_row(row, 2 * C + 1, width, w0, w1, w2, w3, w4, w5, WORDS)


@triton.jit(do_not_specialize=["C"])
def read_moments_kernel(row, count, mean, m2, rstd, C, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """What an added-up row of moments says; ``count`` is written, too."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = ids < C
    n = tl.load(row)
    safe = tl.maximum(n, 1.0)
    total = tl.load(row + 1 + ids, mask=exists, other=0.0)
    squares = tl.load(row + 1 + C + ids, mask=exists, other=0.0)
    centre = total / safe
    spread = tl.fma(-total, centre, squares)
    spread = tl.where(spread < 0, 0.0, spread)  # NaN stays NaN
    tl.store(mean + ids, centre, mask=exists)
    tl.store(m2 + ids, spread, mask=exists)
    tl.store(rstd + ids, 1.0 / tl.sqrt(spread / safe + EPS), mask=exists)
    if tl.program_id(0) == 0:
        tl.store(count, n)


@triton.jit(do_not_specialize=["C", "parts", "width", "host_count", *_WORDS])
def finish_sums_kernel(
    partial, row, means, dbias, dweight, C, parts, width, host_count: tl.int64,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sum partials [parts, 2, C] in a fixed order: as a row or over ``host_count``, and as gradients of bias and weight."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = ids < 2 * C
    total = tl.zeros([PARTS, BLOCK], tl.float64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part[:, None] < parts) & exists[None, :]
        total += tl.load(partial + part[:, None] * 2 * C + ids[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    if means is not None:
        tl.store(means + ids, sums / exact(host_count), mask=exists)
    if dbias is not None:
        tl.store(dbias + ids, sums.to(dbias.dtype.element_ty), mask=ids < C)
        tl.store(dweight + ids - C, sums.to(dweight.dtype.element_ty), mask=(ids >= C) & exists)
    if row is not None:
        tl.store(row + ids, sums, mask=exists)
        _end_row(row, 2 * C, width, w0, w1, w2, w3, w4, w5, WORDS)


@triton.jit(do_not_specialize=["C", "host_count", "momentum"])
def update_running_kernel(
    mean, m2, count, running_mean, running_var, counter, C, host_count: tl.int64, momentum: tl.int64,
    CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Move running statistics as :func:`syncnorm.core.running.update_running` does; by one program if ``CUMULATIVE``."""
    n = exact(host_count)
    if count is not None:
        n = tl.load(count)
    due = n > 1
    factor = exact(momentum)
    if counter is not None:
        tracked = tl.load(counter) + due.to(tl.int64)
        if CUMULATIVE:
            factor = 1.0 / tl.maximum(tracked, 1).to(tl.float64)
    for block in range(BLOCKS):
        ids = (tl.program_id(0) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        mask = ids < tl.where(due, C, 0)
        _move(running_mean + ids, tl.load(mean + ids, mask=mask, other=0.0), factor, mask)
        unbiased = tl.load(m2 + ids, mask=mask, other=0.0) / tl.maximum(n - 1, 1.0)
        _move(running_var + ids, unbiased, factor, mask)
    if counter is not None:  # noqa: SIM102 (known when it is compiled, unlike the program)
        if tl.program_id(0) == 0:
            tl.debug_barrier()
            tl.store(counter, tracked)


@triton.jit
def exact(bits):
    """The float64 of these bits."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _move(buffer, new, factor, mask):
    """As torch's lerp does, in the precision of the buffer, at least float32."""
    WIDE: tl.constexpr = tl.float64 if buffer.dtype.element_ty == tl.float64 else tl.float32
    old, new, weight = tl.load(buffer, mask=mask, other=0.0).to(WIDE), new.to(WIDE), factor.to(WIDE)
    step = new - old
    moved = tl.where(weight < 0.5, old + weight * step, new - step * (1 - weight))
    tl.store(buffer, moved.to(buffer.dtype.element_ty), mask=mask)


@triton.jit
def _end_row(row, first, width, w0, w1, w2, w3, w4, w5, WORDS: tl.constexpr):
    """Zeros from ``first`` on, by all programs, and at the end the words, by one."""
    for start in range(first + tl.program_id(0) * 256, width - WORDS, tl.num_programs(0) * 256):
        ids = start + tl.arange(0, 256)
        tl.store(row + ids, tl.zeros([256], tl.float64), mask=ids < width - WORDS)
    if tl.program_id(0) == 0:
        end = row + width - WORDS
        if WORDS > 0:
            tl.store(end, exact(w0))
        if WORDS > 1:
            tl.store(end + 1, exact(w1))
        if WORDS > 2:
            tl.store(end + 2, exact(w2))
        if WORDS > 3:
            tl.store(end + 3, exact(w3))
        if WORDS > 4:
            tl.store(end + 4, exact(w4))
        if WORDS > 5:
            tl.store(end + 5, exact(w5))
