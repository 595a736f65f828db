"""A direction of the walk in as few calls as there may be: one for a group of one, and two of a rank among others.

What those two calls are, all up to the row that ranks exchange and all after it, is what a rank brings to the exchange.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from syncnorm.core.layout import count_per_channel, flatten, flatten_like, unflatten
from syncnorm.core.moments import Moments
from syncnorm.distributed.agreement import meet
from syncnorm.distributed.row import on_device, on_host, words_of
from syncnorm.functional._one_value import refuse_one_value
from syncnorm.functional._walk import Walk
from syncnorm.kernels import Among, Backend, alone, among, choose

__all__ = ["whole_backward", "whole_forward"]

Forward = tuple[Tensor, Moments, Tensor, Tensor | None]  # y, moments of all ranks, 1/std, mask


def whole_forward(
    backend: Backend,
    x: Tensor,
    shape: torch.Size,
    weight: Tensor | None,
    bias: Tensor | None,
    walk: Walk,
    residual: Tensor | None,
) -> Forward | None:
    """The forward of flat ``x``, which is of that shape, if the backend has such calls.

    For walks that are plain: nothing comes between the moments of all ranks and their use.
    """
    values = count_per_channel(x)
    if walk.group.size == 1:
        if (whole := alone(backend, x)) is None:
            return None
        refuse_one_value(values, values, shape)
        return whole.batch_forward(x, weight, bias, walk.eps, walk.activation, residual)
    if (calls := _among(backend, x)) is None:
        return None
    payload = _Forward(calls, x, weight, bias, walk, residual)
    forward: Forward = meet(payload, walk.group, walk.call, "forward", float(walk.needs_backward))
    refuse_one_value(forward[1].count, values, shape)
    return forward


def whole_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    side: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor | float,
    walk: Walk,
    needs_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
    """Gradients of ``x`` [N, C, *], of the residual (None where it is ``grad``), bias and weight; see :func:`whole_forward`."""
    backend, flat = choose(walk.backend, x), flatten(x)
    whole = alone(backend, flat) if walk.group.size == 1 else None
    calls = None if walk.group.size == 1 else _among(backend, flat)
    if whole is None and calls is None:
        return None
    grad = flatten_like(grad, flat)
    if side is not None and walk.activation is not None and not walk.activation.is_piecewise_linear:
        side = flatten_like(side, flat)
    if whole is not None:
        dx, dresidual, dbias, dweight = whole.batch_backward(
            grad, flat, mean, rstd, weight, bias, walk.activation, side, needs_residual
        )
    else:
        assert calls is not None
        if isinstance(count, Tensor) and on_host(count):
            count = count.item()
        backward = _Backward(calls, grad, flat, mean, rstd, weight, bias, side, count, walk, needs_residual)
        dx, dresidual = meet(backward, walk.group, walk.call, "backward")
        dbias, dweight = backward.dbias, backward.dweight
    return unflatten(dx, x.shape), None if dresidual is None else unflatten(dresidual, x.shape), dbias, dweight


def _among(backend: Backend, x: Tensor) -> Among | None:
    """The backend's calls for a rank among others, where ``x`` is memory."""
    return None if torch.compiler.is_compiling() or not (on_host(x) or on_device(x)) else among(backend)


class _Forward:
    """The forward of flat ``x``: becomes y, the moments of all ranks, 1/std and the mask.

    Whether ranks agree is known after y has been computed, and before anything that was there has changed.
    """

    __slots__ = ("_affine", "_calls", "_residual", "_walk", "_x", "device", "num_words")

    def __init__(
        self,
        calls: Among,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        walk: Walk,
        residual: Tensor | None,
    ) -> None:
        self._calls = calls
        self._x, self._affine, self._walk, self._residual = x, (weight, bias), walk, residual
        self.num_words, self.device = 2 * x.size(1) + 1, x.device

    def pack(self, width: int, words: Sequence[float]) -> Tensor:
        return self._calls.batch_forward_row(self._x, width, words)

    def read(self, row: Tensor, num_words: int) -> tuple[Forward, list[float] | None]:
        walk = self._walk
        y, moments, rstd, mask, words = self._calls.batch_forward_rest(
            row, num_words, self._x, *self._affine, walk.eps, walk.activation, self._residual
        )
        return (y, moments, rstd, mask), words or words_of(row, num_words)


class _Backward:
    """The first derivative: becomes the gradients of x and of the residual (None where it is ``grad``).

    Attributes:
        dbias, dweight: This rank's, once the row is packed.
    """

    __slots__ = ("_arguments", "_calls", "_count", "_needs_residual", "dbias", "device", "dweight", "num_words")

    def __init__(
        self,
        calls: Among,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        side: Tensor | None,
        count: Tensor | float,
        walk: Walk,
        needs_residual: bool,
    ) -> None:
        self._calls = calls
        self._arguments = grad, x, mean, rstd, weight, bias, walk.activation, side
        self._count, self._needs_residual = count, needs_residual
        self.num_words, self.device = 2 * x.size(1), x.device

    def pack(self, width: int, words: Sequence[float]) -> Tensor:
        row, self.dbias, self.dweight = self._calls.batch_backward_row(*self._arguments, width, words)
        return row

    def read(self, row: Tensor, num_words: int) -> tuple[tuple[Tensor, Tensor | None], list[float] | None]:
        dx, dresidual, words = self._calls.batch_backward_rest(
            row, num_words, self._count, *self._arguments, self._needs_residual
        )
        return (dx, dresidual), words or words_of(row, num_words)
