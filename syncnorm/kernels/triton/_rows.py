"""The primitives of row and group norms as sequences of kernels. Group norm is made of those of batch norm.

They are also registered as operators, so activations are names (``""`` for none) and an empty tensor stands for no output.
"""

# M rows, D features; N batch, C channels, S flattened space, G groups

from torch import Tensor

from syncnorm.core.layout import accumulate_dtype
from syncnorm.kernels.triton import _batch, _batch_kernels, _plan
from syncnorm.kernels.triton import _row_kernels as kernels
from syncnorm.kernels.triton._launch import dense, empty, launch
from syncnorm.kernels.triton._plan import plan_row_weights, plan_rows, power_of_two

__all__ = ["group_backward", "group_forward", "row_backward", "row_forward"]


def row_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool, residual: Tensor | None, part: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h, mean and rstd of rows ``x`` [M, D]."""
    (M, D), accumulate = x.shape, accumulate_dtype(x.dtype)
    plan = plan_rows(x, backward=False)
    y = empty(M, D, dtype=x.dtype, device=x.device)
    h = None if residual is None else empty(M, D, dtype=x.dtype, device=x.device)
    mean = empty(M, dtype=accumulate, device=x.device) if centre else None
    rstd = empty(M, dtype=accumulate, device=x.device)
    launch(
        kernels.row_forward_kernel, -(-M // plan.rows), x, residual, y, h, *dense(weight, bias), mean, rstd, M, D, part or D,
        warps=plan.warps, EPS=eps, ALIGN=plan.align, WHOLE=plan.whole, ROWS=plan.rows, COLS=plan.cols,
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, x.new_empty(0) if mean is None else mean, rstd


def row_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_bias: bool,
    grad_h: Tensor | None,
    part: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias."""
    (M, D), accumulate = h.shape, accumulate_dtype(h.dtype)
    plan = plan_rows(h, backward=True)
    dx = empty(M, D, dtype=h.dtype, device=h.device)
    by_columns = None if plan.whole or not (needs_weight or needs_bias) else plan_row_weights(h)
    parts = plan.programs if by_columns is None else by_columns.programs
    dweight = empty(parts, D, dtype=accumulate, device=h.device) if needs_weight else None
    dbias = empty(parts, D, dtype=accumulate, device=h.device) if needs_bias else None
    held = (dweight, dbias) if plan.whole else (None, None)
    launch(
        kernels.row_backward_kernel, plan.programs, grad, h, grad_h, dx, *dense(weight, mean, rstd), *held, M, D, part or D,
        plan.programs, warps=plan.warps, registers=_plan.ROW_REGISTERS,
        ALIGN=plan.align, WHOLE=plan.whole, ROWS=plan.rows, COLS=plan.cols, STAGES=plan.stages,
    )  # fmt: skip
    if by_columns is not None:
        blocks = -(-D // by_columns.cols)
        launch(
            kernels.row_weight_kernel, blocks * parts, grad, h, mean, rstd, dweight, dbias, M, D, parts, blocks,
            warps=by_columns.warps, ALIGN=by_columns.align, ROWS=by_columns.rows, COLS=by_columns.cols,
        )  # fmt: skip
    dweight, dbias = (h.new_empty(0) if t is None else _batch.sum_parts(t, accumulate) for t in (dweight, dbias))
    return dx, dweight, dbias


def group_forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd [N, G] of ``x`` [N, C, S]."""
    stats, size = x.size(0) * num_groups, x.size(1) // num_groups
    flat, adjacent = _samples(x), size
    if x.is_contiguous():  # a group is one run of memory
        partial, walk = _batch.partial_moments(x.view(1, stats, -1))
        adjacent = 1
    else:
        partial, walk = _batch.partial_moments(flat)
    mean, rstd = (
        empty(x.size(0), num_groups, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(2)
    )  # fmt: skip
    launch(
        _batch_kernels.merge_kernel, -(-stats // 8), partial, mean, rstd, stats, adjacent, walk.splits,
        EPS=eps, RSTD=True, BLOCK=8, PARTS=min(64, power_of_two(walk.splits * adjacent)),
    )  # fmt: skip
    y, _ = _batch.normalize(flat, mean, rstd, weight, bias, activation, slope, None, size)
    return y.view(x.shape) if x.is_contiguous() else y, mean, rstd


def group_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, like it, and of weight and bias [C]."""
    (N, C, S), size = x.shape, x.size(1) // num_groups
    flat, grad = _samples(x), _samples(grad)
    sums = _batch.backward_reduce(grad, flat, mean, rstd, weight, bias, activation, slope, None, size).view(2, N, C)
    dbias, dweight = sums.sum(1).to(accumulate_dtype(x.dtype)).unbind(0)
    weighted = sums if weight is None else sums * weight
    means = weighted.view(2, N * num_groups, size).sum(2) / (size * S)
    dx, _ = _batch.backward_input(
        grad, flat, mean, rstd, weight, means, bias, activation, slope, None, False, size, weighted_means=True
    )  # fmt: skip
    return dx.view(x.shape) if x.is_contiguous() else dx, dweight.clone(), dbias.clone()


def _samples(x: Tensor) -> Tensor:
    """``x`` [N, C, S] so that every sample has channels of its own: [1, N·C, S], or as it is if its channels are innermost."""
    return x.reshape(1, -1, x.size(2)) if x.is_contiguous() else x
