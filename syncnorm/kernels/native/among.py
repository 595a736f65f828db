"""The walk of one rank among others: each direction in two calls, around the one exchange."""

from collections.abc import Sequence

import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.kernels.native import _code

__all__ = ["batch_backward_rest", "batch_backward_row", "batch_forward_rest", "batch_forward_row"]


def batch_forward_row(x: Tensor, width: int, words: Sequence[float]) -> Tensor:
    """The moments of flat ``x``, packed."""
    row: Tensor = torch.ops.syncnorm.batch_forward_row.default(x, width, words)
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
) -> tuple[Tensor, Moments, Tensor, Tensor | None, list[float]]:
    """y, moments, 1/std, mask, and the last words of the summed row."""
    y, mean, m2, rstd, mask, count, words = torch.ops.syncnorm.batch_forward_rest.default(
        row, num_words, x, weight, bias, eps, *_code(activation), residual
    )
    return y, Moments(count, mean, m2), rstd, mask if mask.numel() else None, words


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
    packed: tuple[Tensor, Tensor, Tensor] = torch.ops.syncnorm.batch_backward_row.default(
        grad, x, mean, rstd, weight, bias, *_code(activation), side, width, words
    )
    return packed


def batch_backward_rest(
    row: Tensor,
    num_words: int,
    count: float,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    side: Tensor | None,
    needs_residual: bool,
) -> tuple[Tensor, Tensor | None, list[float]]:
    """Gradients of x and of the residual (None where it is ``grad``), and the last words of the summed row."""
    needs_residual = needs_residual and activation is not None
    dx, dresidual, words = torch.ops.syncnorm.batch_backward_rest.default(
        row, num_words, count, grad, x, mean, rstd, weight, bias, *_code(activation), side, needs_residual
    )
    return dx, dresidual if needs_residual else None, words
