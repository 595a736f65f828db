# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Kernels over rows [M, D]: layer norm where a mean is given, else RMS norm, the mean square over the first ``part``.

A row that fits stays in registers between its statistics and its output. The backward's programs each walk many rows and
write one row of partial weight gradients, which are added in a fixed order afterwards.
"""

# M rows, D features; a tile is [ROWS, COLS], and WHOLE says that it holds whole rows

import triton
import triton.language as tl

__all__ = ["row_backward_kernel", "row_forward_kernel", "row_weight_kernel"]

_SHAPES = ("M", "D", "part", "programs", "blocks")


@triton.jit(do_not_specialize=_SHAPES)
def row_forward_kernel(
    x, residual, y, h, weight, bias, mean, rstd, M, D, part,
    EPS: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``h = x + residual`` and ``(h - mean)·rstd·weight + bias``, with statistics of h as it is stored."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    width = D // ALIGN * ALIGN
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < M
    at = first * width + row[:, None] * width
    col = tl.arange(0, COLS)
    if WHOLE:
        mask = live[:, None] & (col < width)[None, :]
        v = _values(x, residual, h, at + col[None, :], mask).to(ACC)
        if mean is not None:
            centre = tl.sum(v, 1) / D
            d = tl.where(mask, v - centre[:, None], 0.0)
            s = 1 / tl.sqrt(tl.sum(d * d, 1) / D + EPS)
            tl.store(mean + first + row, centre, mask=live)
        else:
            d = v
            s = 1 / tl.sqrt(tl.sum(tl.where((col < part)[None, :], v * v, 0.0), 1) / part + EPS)
        tl.store(y + at + col[None, :], _scaled(d, s, weight, bias, col, col < width).to(y.dtype.element_ty), mask=mask)
    else:
        # Deviations from the mean of the first tile, as in moments_kernel.
        mask = live[:, None] & (col < width)[None, :]
        pivot = tl.sum(_values(x, residual, None, at + col[None, :], mask).to(ACC), 1) / tl.minimum(D, COLS)
        if mean is None:
            pivot = tl.zeros_like(pivot)
        total = tl.zeros([ROWS, COLS], ACC)
        squares = tl.zeros([ROWS, COLS], ACC)
        for start in range(0, width, COLS):
            mask = live[:, None] & (start + col < width)[None, :]
            v = _values(x, residual, h, at + start + col[None, :], mask).to(ACC)
            d = tl.where(mask & (start + col < part)[None, :], v - pivot[:, None], 0.0)
            total += d
            squares = tl.fma(d, d, squares)
        shift = tl.sum(total, 1) / part
        square = tl.sum(squares, 1) / part
        if mean is not None:
            square = tl.maximum(square - shift * shift, 0.0)
            pivot += shift
            tl.store(mean + first + row, pivot, mask=live)
        s = 1 / tl.sqrt(square + EPS)
        for start in range(0, width, COLS):
            mask = live[:, None] & (start + col < width)[None, :]
            d = _values(x, residual, None, at + start + col[None, :], mask).to(ACC) - pivot[:, None]
            out = _scaled(d, s, weight, bias, start + col, start + col < width)
            tl.store(y + at + start + col[None, :], out.to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + first + row, s, mask=live)


@triton.jit(do_not_specialize=_SHAPES)
def row_backward_kernel(
    grad, h, grad_h, dx, weight, mean, rstd, dweight, dbias, M, D, part, programs,
    ALIGN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``rstd·(u - ⟨u⟩ - x̂⟨u·x̂⟩) + grad_h`` with ``u = grad·weight``.

    Of whole rows also partial Σ grad·x̂ and Σ grad, [programs, D].
    """
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    width = D // ALIGN * ALIGN
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    if dweight is not None:
        products = tl.zeros([ROWS, COLS], ACC)
    if dbias is not None:
        total = tl.zeros([ROWS, COLS], ACC)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * ROWS
        live = first + row < M
        at = first * width + row[:, None] * width
        s = tl.load(rstd + first + row, mask=live, other=0.0)[:, None]
        centre = tl.zeros_like(s)
        if mean is not None:
            centre = tl.load(mean + first + row, mask=live, other=0.0)[:, None]
        if WHOLE:
            mask = live[:, None] & (col < width)[None, :]
            g = tl.load(grad + at + col[None, :], mask=mask, other=0.0).to(ACC)
            x_hat = (tl.load(h + at + col[None, :], mask=mask, other=0.0).to(ACC) - centre) * s
            u = _weighted(g, weight, col, col < width)
            slope = tl.sum(u * x_hat, 1)[:, None] / part
            offset = tl.zeros_like(slope)
            if mean is not None:
                offset = tl.sum(u, 1)[:, None] / D
            _store_input_gradient(dx, grad_h, at + col[None, :], mask, u, x_hat, s, offset, slope, col < part)
            if dweight is not None:
                products = tl.fma(g, x_hat, products)
            if dbias is not None:
                total += g
        else:
            sums = tl.zeros([ROWS, COLS], ACC)
            sums_u = tl.zeros([ROWS, COLS], ACC)
            for start in range(0, width, COLS):
                mask = live[:, None] & (start + col < width)[None, :]
                g = tl.load(grad + at + start + col[None, :], mask=mask, other=0.0).to(ACC)
                x_hat = (tl.load(h + at + start + col[None, :], mask=mask, other=0.0).to(ACC) - centre) * s
                u = _weighted(g, weight, start + col, start + col < width)
                sums = tl.fma(u, x_hat, sums)
                sums_u += u
            slope = tl.sum(sums, 1)[:, None] / part
            offset = tl.zeros_like(slope)
            if mean is not None:
                offset = tl.sum(sums_u, 1)[:, None] / D
            for start in range(0, width, COLS):
                mask = live[:, None] & (start + col < width)[None, :]
                g = tl.load(grad + at + start + col[None, :], mask=mask, other=0.0).to(ACC)
                x_hat = (tl.load(h + at + start + col[None, :], mask=mask, other=0.0).to(ACC) - centre) * s
                u = _weighted(g, weight, start + col, start + col < width)
                used = start + col < part
                _store_input_gradient(dx, grad_h, at + start + col[None, :], mask, u, x_hat, s, offset, slope, used)
    out = tl.cast(tl.program_id(0), tl.int64) * D + col
    if dweight is not None:
        tl.store(dweight + out, tl.sum(products, 0), mask=col < width)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(total, 0), mask=col < width)


@triton.jit(do_not_specialize=_SHAPES)
def row_weight_kernel(
    grad, h, mean, rstd, dweight, dbias, M, D, programs, blocks,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Partial Σ grad·x̂ and Σ grad, [programs, D], for rows too long for the other kernel to hold them."""
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    width = D // ALIGN * ALIGN
    row = tl.arange(0, ROWS)
    col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    split = tl.program_id(0) // blocks
    products = tl.zeros([ROWS, COLS], ACC)
    total = tl.zeros([ROWS, COLS], ACC)
    for tile in range(split, tl.cdiv(M, ROWS), programs):
        first = tl.cast(tile, tl.int64) * ROWS
        live = first + row < M
        mask = live[:, None] & (col < width)[None, :]
        at = first * width + row[:, None] * width + col[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        v = tl.load(h + at, mask=mask, other=0.0).to(ACC)
        if mean is not None:
            v -= tl.load(mean + first + row, mask=live, other=0.0)[:, None]
        products = tl.fma(g, v * tl.load(rstd + first + row, mask=live, other=0.0)[:, None], products)
        total += g
    out = tl.cast(split, tl.int64) * D + col
    if dweight is not None:
        tl.store(dweight + out, tl.sum(products, 0), mask=col < width)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(total, 0), mask=col < width)


@triton.jit
def _values(x, residual, h, at, mask):
    """What is normalised, in the dtype of ``x``; stored to ``h`` where that is given."""
    v = tl.load(x + at, mask=mask, other=0.0)
    if residual is not None:
        v = (v.to(tl.float32) if v.dtype != tl.float64 else v) + tl.load(residual + at, mask=mask, other=0.0)
        v = v.to(x.dtype.element_ty)
        if h is not None:
            tl.store(h + at, v, mask=mask)
    return v


@triton.jit
def _scaled(d, s, weight, bias, col, exists):
    y = d * s[:, None]
    if weight is not None:
        y *= tl.load(weight + col, mask=exists, other=0.0).to(d.dtype)[None, :]
    if bias is not None:
        y += tl.load(bias + col, mask=exists, other=0.0).to(d.dtype)[None, :]
    return y


@triton.jit
def _weighted(g, weight, col, exists):
    if weight is not None:
        return g * tl.load(weight + col, mask=exists, other=0.0).to(g.dtype)[None, :]
    else:
        return g


@triton.jit
def _store_input_gradient(dx, grad_h, at, mask, u, x_hat, s, offset, slope, used):
    out = s * (u - offset - tl.where(used[None, :], x_hat, 0.0) * slope)
    if grad_h is not None:
        out += tl.load(grad_h + at, mask=mask, other=0.0).to(out.dtype)
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
