"""Moments of each sample and channel over space, and norms that are affine in x given such numbers.

Where memory has a sample's channels one after the other, each is a channel of the batch primitives for one sample of N·C
channels: one pass for the moments, one to normalise, one for the sums of the backward.
"""

# N batch, C channels, S flattened space

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.layout import accumulate_dtype
from syncnorm.core.traced import is_transformed
from syncnorm.functional._walk import apply_function
from syncnorm.kernels import choose

__all__ = ["are_rows", "beside", "instance_moments", "normalize_samples", "sample_rows"]


def beside(vector: Tensor, x: Tensor) -> Tensor:
    """View ``vector`` [C] or [N, C] so that it broadcasts over ``x`` [N, C, *]."""
    return vector.reshape(*vector.shape, *[1] * (x.dim() - 2))


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample and channel of ``x`` [N, C, *] over space, ``[N, C]``, at least float32.

    A single value is its own mean and has variance 0. Without any value both are 0.
    """
    if are_rows(x):
        mean, var = apply_function(_Moments, x)
        return mean, var
    x = x.to(accumulate_dtype(x.dtype))
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    dims = list(range(2, x.dim()))
    if not x.numel():
        zeros = x.sum(dims)
        return zeros, torch.zeros_like(zeros)  # two tensors: Dynamo takes none twice
    if (
        torch.compiler.is_compiling()
    ):  # Inductor of torch 2.13 fails at the backward of var_mean behind a convolution of any size
        mean = x.mean(dims)
        return mean, (x - beside(mean, x)).square().mean(dims)
    var, mean = torch.var_mean(x, dims, correction=0)
    return mean, var


def normalize_samples(x: Tensor, mean: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Compute ``(x - mean)·scale + shift`` in the dtype of ``x`` [N, C, *].

    Args:
        x: ``[N, C, *]``.
        mean: ``[N, C]``, at least float32 as are the next two; None for 0.
        scale: ``[N, C]``.
        shift: ``[N, C]`` or ``[C]``, or None.
    """
    if not are_rows(x):
        y = (x if mean is None else x - beside(mean, x)) * beside(scale, x)
        return (y if shift is None else y + beside(shift, x)).to(x.dtype)
    mean = torch.zeros_like(scale) if mean is None else mean
    shift = None if shift is None else shift.expand_as(scale)
    normalized: Tensor = apply_function(_Normalize, x, mean, scale, shift)
    return normalized


def are_rows(x: Tensor) -> bool:
    """Whether the moments of ``x`` are those of the rows of :func:`sample_rows`, and are asked for outside of a trace."""
    # Traced, the plain formulas are what Inductor fuses best; and transforms go through them.
    return (
        x.dim() > 2
        and x.is_contiguous()
        and x.numel() > x.size(0) * x.size(1)  # a single value is its own mean to the bit
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


def sample_rows(x: Tensor) -> Tensor:
    """View contiguous ``x`` [N, C, *] as [1, N·C, S]."""
    return x.view(1, x.size(0) * x.size(1), -1)


class _Moments(Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = sample_rows(x)
        moments = choose("auto", rows).batch_moments(rows)
        dtype = accumulate_dtype(x.dtype)
        return moments.mean.view(x.shape[:2]).to(dtype), moments.var.view(x.shape[:2]).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        # Differentiable, and the saved mean leads back into this node.
        x, mean = ctx.saved_tensors
        size = x.shape[2:].numel()
        centred = x - beside(mean, x)
        return torch.addcmul(beside(grad_mean / size, x), centred, beside(grad_var * (2 / size), x)).to(x.dtype)


class _Normalize(Function):
    @staticmethod
    def forward(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        rows = sample_rows(x)
        vectors = (mean.flatten().double(), scale.flatten().double())
        y, _ = choose("auto", rows).batch_normalize(rows, *vectors, None, None if shift is None else shift.flatten())
        return y.view(x.shape).data  # no view, for whoever changes it in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.shift_dtype = None if inputs[3] is None else inputs[3].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: in differentiable operations
            dims = list(range(2, x.dim()))
            g = grad.to(mean.dtype)
            dshift, dscale = g.sum(dims), (g * (x - beside(mean, x))).sum(dims)
        else:
            rows, g = sample_rows(x), grad.contiguous()
            centre = mean.flatten().double()
            sums = choose("auto", rows).batch_backward_reduce(sample_rows(g), rows, centre, torch.ones_like(centre))
            dshift, dscale = sums.view(2, *mean.shape).to(mean.dtype).unbind(0)
        dx = (grad * beside(scale, x)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, -scale * dshift, dscale, None if ctx.shift_dtype is None else dshift.to(ctx.shift_dtype)
