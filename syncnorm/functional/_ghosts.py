"""The ghosts of one batch, each normalised by itself: by one call each way where the backend has such calls.

Such a call writes straight into its results, where ghost by ghost they would have to be joined, forward and backward.
"""

# N batch, C channels, K ghosts

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.layout import count_per_channel, flatten, flatten_like, unflatten
from syncnorm.core.moments import Moments, stack_moments
from syncnorm.functional._batch_backward import Backward
from syncnorm.functional._batch_normalize import batch_normalize_and_moments
from syncnorm.functional._walk import Walk, apply_function
from syncnorm.kernels import Alone, alone, choose

__all__ = ["normalize_ghosts"]


def normalize_ghosts(
    x: Tensor, sizes: Sequence[int], weight: Tensor | None, bias: Tensor | None, walk: Walk
) -> tuple[Tensor, Moments]:
    """Normalise ghosts of these numbers of samples of ``x`` [N, C, *], each by its own moments over the ranks of the walk.

    Returns:
        The output, and the moments [K, C], which carry no gradient.
    """
    if len(sizes) > 1 and _whole(x, walk) is not None:
        y, *moments, _ = apply_function(_Ghosts, x, weight, bias, walk, tuple(sizes))
        return y, Moments(*moments)
    ghosts = x.split(sizes) if len(sizes) > 1 else (x,)
    outputs, parts = zip(*(batch_normalize_and_moments(g, weight, bias, walk, None) for g in ghosts), strict=True)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), stack_moments(list(parts))


def _whole(x: Tensor, walk: Walk) -> Alone | None:
    """The calls for all ghosts of a rank, where they serve; a recompute of a checkpoint finds what its forward found."""
    if walk.group.size > 1 or not x.numel() or torch.compiler.is_compiling():
        return None
    return alone(choose(walk.backend, x), x)


class _Ghosts(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, walk: Walk, sizes: tuple[int, ...]
    ) -> tuple[Any, ...]:
        whole, flat = _whole(x, walk), flatten(x)
        assert whole is not None
        y, moments, rstd, _ = whole.batch_forward(flat, weight, bias, walk.eps, None, None, _chunks(flat, x, sizes))
        # The same memory but no view, for the ReLU(inplace=True) that often follows.
        return unflatten(y, x.shape).data, *moments, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, ctx.walk, ctx.sizes = inputs
        _, _, mean, _, rstd = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if grad is None:
            grad = torch.zeros_like(x)
        dx: Tensor | None
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        whole = None if differentiable or not needs_x else _whole(x, ctx.walk)
        if whole is None:
            dx, dweight, dbias = _one_by_one(grad, x, weight, mean, rstd, ctx.walk, ctx.sizes, needs_x)
        else:
            flat = flatten(x)
            dx, _, dbias, dweight = whole.batch_backward(
                flatten_like(grad, flat), flat, mean, rstd, weight, None, None, None, False, _chunks(flat, x, ctx.sizes)
            )
            dx = unflatten(dx, x.shape)
        return (
            dx,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
        )


def _chunks(flat: Tensor, x: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Sizes of the ghosts of ``x`` along dim 0 of its flat form, [N, C, S] or [M, C]."""
    rows = flat.size(0) // x.size(0)
    return [size * rows for size in sizes]


def _one_by_one(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    walk: Walk,
    sizes: tuple[int, ...],
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of ``x``, weight and bias, themselves differentiable."""
    parts = [
        apply_function(Backward, g, ghost, weight, m, r, float(count_per_channel(ghost)), walk, needs_x)
        for g, ghost, m, r in zip(grad.split(sizes), x.split(sizes), mean, rstd, strict=True)
    ]
    dx, dweight, dbias, _ = zip(*parts, strict=True)
    return torch.cat(dx) if needs_x else None, torch.stack(dweight).sum(0), torch.stack(dbias).sum(0)
