"""The walk of one rank among others: each direction in two calls, around the one exchange."""

from collections.abc import Sequence

from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.kernels.triton import spelled

__all__ = ["batch_backward_rest", "batch_backward_row", "batch_forward_rest", "batch_forward_row"]


def batch_forward_row(x: Tensor, width: int, words: Sequence[float]) -> Tensor:
    """The moments of flat ``x``, packed."""
    from syncnorm.kernels.triton import _whole

    return _whole.forward_row(x, width, words)


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
    """y, moments, 1/std, mask; the host does not look at the words."""
    from syncnorm.kernels.triton import _whole

    return *_whole.forward_rest(row, x, weight, bias, eps, *spelled(activation), residual), None


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
    from syncnorm.kernels.triton import _whole

    return _whole.backward_row(grad, x, mean, rstd, weight, bias, *spelled(activation), side, width, words)


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
    from syncnorm.kernels.triton import _whole

    if not isinstance(count, Tensor):
        count = row.new_full((), count)
    return *_whole.backward_rest(
        row, count, grad, x, mean, rstd, weight, bias, *spelled(activation), side, needs_residual
    ), None  # fmt: skip
