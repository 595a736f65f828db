"""The walk of one rank among others: each direction in two calls, around the one exchange.

Imports triton, which the package itself leaves to its first call.
"""

# C channels

from collections.abc import Sequence

import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.kernels.triton import _vector_kernels as kernels
from syncnorm.kernels.triton import spelled
from syncnorm.kernels.triton._batch import input_gradient_into, like, normalize_into, partial_moments, partial_sums
from syncnorm.kernels.triton._launch import empty, launch
from syncnorm.kernels.triton._whole import VECTOR, affine_dtype, finish_moments, finish_sums

__all__ = ["batch_backward_rest", "batch_backward_row", "batch_forward_rest", "batch_forward_row"]


def batch_forward_row(x: Tensor, width: int, words: Sequence[float]) -> Tensor:
    """The moments of flat ``x``, packed."""
    partial, walk = partial_moments(x)
    row = empty(width, dtype=torch.float64, device=x.device)
    finish_moments(partial, walk.splits, (None,) * 4, row, width, words, 0.0)
    return row


def batch_forward_rest(
    row: Tensor,
    num_words: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    residual: Tensor | None,
) -> tuple[Tensor, Moments, Tensor, Tensor | None, None]:
    """y, moments (the count a tensor), 1/std, mask; the host does not look at the words."""
    C = x.size(1)
    mean, m2, rstd = empty(3, C, dtype=torch.float64, device=x.device).unbind(0)
    count = empty(1, dtype=torch.float64, device=x.device)
    launch(kernels.read_moments_kernel, -(-C // VECTOR), row, count, mean, m2, rstd, C, EPS=eps, BLOCK=VECTOR)
    y = like(x)
    bits = normalize_into(y, x, mean, rstd, weight, bias, *spelled(activation), residual)
    return y, Moments(count.view(()), mean, m2), rstd, bits, None


def batch_backward_row(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    side: Tensor | None,
    width: int,
    words: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Σg' and Σg'·x̂, packed; and as gradients of bias and weight."""
    row = empty(width, dtype=torch.float64, device=x.device)
    dbias, dweight = empty(2, x.size(1), dtype=affine_dtype(weight), device=x.device).unbind(0)
    partial = partial_sums(grad, x, mean, rstd, weight, bias, *spelled(activation), side)
    finish_sums(partial, row, None, dbias, dweight, width, words, 1.0)
    return row, dbias, dweight


def batch_backward_rest(
    row: Tensor,
    num_words: int,
    count: Tensor | float,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    side: Tensor | None,
    needs_residual: bool,
) -> tuple[Tensor, Tensor | None, None]:
    """Gradients of x and of the residual (None where it is ``grad``)."""
    if not isinstance(count, Tensor):
        count = row.new_full((), count)
    dx, dresidual = like(x), like(x) if needs_residual and activation else None
    sums = row[: 2 * x.size(1)].view(2, -1)
    input_gradient_into(
        dx, dresidual, grad, x, mean, rstd, weight, sums, count, bias, *spelled(activation), side
    )  # fmt: skip
    return dx, dresidual, None
