"""A direction of batch normalisation as few kernels, for a group of one; and running statistics as one.

Eager calls on plain tensors only; whoever traces is shown the primitives.
"""

# N batch, C channels, K chunks, S flattened space, M = N·S

import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from syncnorm.core.layout import count_per_channel
from syncnorm.core.moments import Moments
from syncnorm.kernels.triton import _vector_kernels as kernels
from syncnorm.kernels.triton._batch import (
    input_gradient_into,
    like,
    normalize_into,
    partial_moments,
    partial_sums,
)
from syncnorm.kernels.triton._launch import empty, launch
from syncnorm.kernels.triton._plan import power_of_two

__all__ = ["VECTOR", "affine_dtype", "backward", "finish_moments", "finish_sums", "forward", "move_running"]

_MOST_WORDS = 6
_CHANNELS = 8  # of a program that merges partials
VECTOR = 256  # channels of a program that walks vectors


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    residual: Tensor | None,
    chunks: Sequence[int],
) -> tuple[Tensor, Moments, Tensor, Tensor | None]:
    """y, moments, 1/std and mask; of each chunk by itself if there are any, then with statistics [K, C]."""
    y, bits, C = like(x), None, x.size(1)
    mean, m2, rstd = empty(3, max(len(chunks), 1), C, dtype=torch.float64, device=x.device).unbind(0)
    counts = empty(len(chunks), dtype=torch.float64, device=x.device) if chunks else None
    for k, part in enumerate(_slices(x, chunks)):
        partial, walk = partial_moments(x[part])
        vectors = mean[k], m2[k], rstd[k], None if counts is None else counts[k]
        finish_moments(partial, walk.splits, vectors, None, 0, (), eps)
        bits = normalize_into(y[part], x[part], mean[k], rstd[k], weight, bias, activation, slope, residual)
    if counts is not None:
        return y, Moments(counts, mean, m2), rstd, None
    return y, Moments(float(count_per_channel(x)), mean[0], m2[0]), rstd[0], bits


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
    side: Tensor | None,
    needs_residual: bool,
    chunks: Sequence[int],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, residual, bias and weight; the last two summed over the chunks."""
    dx, dresidual = like(x), like(x) if needs_residual and activation else None
    if not chunks:
        mean, rstd = mean[None], rstd[None]
    affine = empty(2, mean.size(0), x.size(1), dtype=affine_dtype(weight), device=x.device)
    dbias, dweight = affine.unbind(0)
    means = empty(2, x.size(1), dtype=torch.float64, device=x.device)
    for k, part in enumerate(_slices(x, chunks)):
        partial = partial_sums(grad[part], x[part], mean[k], rstd[k], weight, bias, activation, slope, side)
        count = float(count_per_channel(x[part]))
        finish_sums(partial, None, means, dbias[k], dweight[k], 0, (), count)
        input_gradient_into(
            dx[part], dresidual, grad[part], x[part], mean[k], rstd[k], weight, means, None, bias, activation, slope, side
        )  # fmt: skip
    if chunks:
        dbias, dweight = affine.sum(1).unbind(0)
    else:
        dbias, dweight = dbias[0], dweight[0]
    return dx, dresidual, dbias, dweight


def move_running(
    moments: Moments, mean: Tensor, var: Tensor, counter: Tensor | None, momentum: float | None
) -> None:  # fmt: skip
    """Running statistics [C], in place, and their counter."""
    C, count = mean.numel(), moments.count
    host, device = (1.0, count) if isinstance(count, Tensor) else (count, None)
    cumulative = momentum is None and counter is not None
    blocks = power_of_two(-(-C // VECTOR)) if cumulative else 1
    launch(
        kernels.update_running_kernel, -(-C // (VECTOR * blocks)), moments.mean, moments.m2, device, mean, var, counter, C,
        _bits(host), _bits(momentum or 0.0), CUMULATIVE=cumulative, BLOCK=VECTOR, BLOCKS=blocks,
    )  # fmt: skip


def finish_moments(
    partial: Tensor,
    splits: int,
    vectors: Sequence[Tensor | None],
    row: Tensor | None,
    width: int,
    words: Sequence[float],
    eps: float,
) -> None:
    """Merge partials into ``vectors`` (mean, M2, 1/std and count), or into a row."""
    C = partial.size(2)
    launch(
        kernels.finish_moments_kernel, -(-C // _CHANNELS), partial, *vectors, row, C, splits, width, *_said(words),
        EPS=eps, WORDS=len(words), BLOCK=_CHANNELS, PARTS=min(64, power_of_two(splits)),
    )  # fmt: skip


def finish_sums(
    partial: Tensor,
    row: Tensor | None,
    means: Tensor | None,
    dbias: Tensor,
    dweight: Tensor,
    width: int,
    words: Sequence[float],
    count: float,
) -> None:
    """Sum partials into a row, or over ``count`` into ``means``; and into gradients of bias and weight."""
    parts, _, C = partial.shape
    launch(
        kernels.finish_sums_kernel, -(-2 * C // 16), partial, row, means, dbias, dweight, C, parts, width, _bits(count),
        *_said(words), WORDS=len(words), BLOCK=16, PARTS=min(64, power_of_two(parts)),
    )  # fmt: skip


def _said(words: Sequence[float]) -> list[int]:
    return [*map(_bits, words), *[0] * (_MOST_WORDS - len(words))]


def _bits(value: float) -> int:
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)


def affine_dtype(weight: Tensor | None) -> torch.dtype:
    """Of the gradients of bias and weight."""
    return torch.float64 if weight is None else weight.dtype


def _slices(x: Tensor, chunks: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in chunks or (x.size(0),):
        yield slice(start, start + size)
        start += size
