"""The primitives of batch normalisation as sequences of kernels: shapes and memory here, arithmetic in _batch_kernels.

They are also registered as operators, so activations are names (``""`` for none) and an empty tensor stands for no output.
"""

# N batch, C channels, S flattened space, M = N·S

from typing import Any

import torch
from torch import Tensor

from syncnorm.kernels.triton import _batch_kernels as kernels
from syncnorm.kernels.triton._activations import CODES
from syncnorm.kernels.triton._launch import dense, empty, launch
from syncnorm.kernels.triton._plan import Walk, plan_walk, power_of_two

__all__ = [
    "backward_input",
    "backward_reduce",
    "input_gradient_into",
    "like",
    "moments",
    "normalize",
    "normalize_into",
    "partial_moments",
    "partial_sums",
    "sum_parts",
]

_PIECEWISE_LINEAR = ("relu", "leaky_relu")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 per channel of flat ``x``, float64 [C]."""
    partial, walk = partial_moments(x)
    mean, m2 = (empty(walk.num_channels, dtype=torch.float64, device=x.device) for _ in range(2))
    launch(
        kernels.merge_kernel, -(-walk.num_channels // 8), partial, mean, m2, walk.num_channels, 1, walk.splits,
        EPS=0.0, RSTD=False, BLOCK=8, PARTS=min(64, power_of_two(walk.splits)),
    )  # fmt: skip
    return mean, m2


def partial_moments(x: Tensor) -> tuple[Tensor, Walk]:
    """Counts, means and M2 of every split, float64 [splits, 3, channels of all instances]."""
    walk = plan_walk(x, tensors=1, reduces=True)
    partial = empty(walk.splits, 3, walk.num_channels, dtype=torch.float64, device=x.device)
    launch(
        kernels.moments_kernel, walk.blocks * walk.splits, x, partial, walk.C, walk.S, walk.tiles, walk.splits, walk.blocks,
        walk.num_channels, warps=walk.warps, STAGES=walk.stages, **_tile(walk),
    )  # fmt: skip
    return partial, walk


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
    residual: Tensor | None,
    group: int = 1,
) -> tuple[Tensor, Tensor]:
    """``act((x - mean)·rstd·weight + bias + residual)`` with ``group`` adjacent channels to a mean; and the mask."""
    y = like(x)
    bits = normalize_into(y, x, mean, rstd, weight, bias, activation, slope, residual, group)
    return y, x.new_empty(0) if bits is None else bits


def normalize_into(
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
    residual: Tensor | None,
    group: int = 1,
) -> Tensor | None:
    """:func:`normalize` into ``y``; returns the mask, if there is one."""
    walk = plan_walk(x, tensors=2)
    bits, vectors = None, dense(mean, rstd, weight, bias)
    if residual is not None and activation in _PIECEWISE_LINEAR:
        width = walk.C if walk.channels_last else walk.S
        bits = empty(x.numel() // width, -(-width // 8), dtype=torch.uint8, device=x.device)
    launch(
        kernels.normalize_kernel, -(-walk.tiles // walk.steps) * walk.blocks, x, y, *vectors, residual, bits,
        walk.C, walk.S, walk.tiles, walk.blocks, walk.steps, group, _num_affine(weight, bias),
        warps=walk.warps, **_activation(activation, slope), **_tile(walk),
    )  # fmt: skip
    return bits


def backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
    side: Tensor | None,
    group: int = 1,
) -> Tensor:
    """Σg' and Σg'·x̂, float64 [2, channels of all instances]."""
    return sum_parts(partial_sums(grad, x, mean, rstd, weight, bias, activation, slope, side, group), torch.float64)


def partial_sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
    side: Tensor | None,
    group: int = 1,
) -> Tensor:
    """:func:`backward_reduce` of every split, float64 [splits, 2, channels of all instances]."""
    walk = plan_walk(x, tensors=2, reduces=True)
    partial = empty(walk.splits, 2, walk.num_channels, dtype=torch.float64, device=x.device)
    launch(
        kernels.backward_reduce_kernel, walk.blocks * walk.splits, grad, x, partial, *dense(mean, rstd, weight, bias),
        *_sides(activation, side), walk.C, walk.S, walk.tiles, walk.splits, walk.blocks, walk.num_channels, group,
        _num_affine(weight, bias), warps=walk.warps, STAGES=walk.stages, **_activation(activation, slope), **_tile(walk),
    )  # fmt: skip
    return partial


def sum_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dim in float64, always in the same order."""
    if partial.size(0) == 1 and partial.dtype == dtype:
        return partial.squeeze(0)
    width = partial[0].numel()
    out = empty(*partial.shape[1:], dtype=dtype, device=partial.device)
    launch(
        kernels.sum_kernel, -(-width // 16), partial, out, width, partial.size(0),
        BLOCK=16, PARTS=min(64, power_of_two(partial.size(0))),
    )  # fmt: skip
    return out


def backward_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    means: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    side: Tensor | None,
    needs_residual: bool,
    group: int = 1,
    weighted_means: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rstd·weight·(g' - ⟨g'⟩ - x̂⟨g'·x̂⟩)``; and g' where asked for. ``means`` [2, C / group], see the kernel."""
    dx, dresidual = like(x), like(x) if needs_residual and activation else None
    input_gradient_into(
        dx, dresidual, grad, x, mean, rstd, weight, means, None, bias, activation, slope, side, group, weighted_means
    )  # fmt: skip
    return dx, x.new_empty(0) if dresidual is None else dresidual


def input_gradient_into(
    dx: Tensor,
    dresidual: Tensor | None,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    means: Tensor,
    count: Tensor | None,
    bias: Tensor | None,
    activation: str,
    slope: float,
    side: Tensor | None,
    group: int = 1,
    weighted_means: bool = False,
) -> None:
    """:func:`backward_input` into ``dx`` and ``dresidual``. With a ``count``, ``means`` are sums to be divided by it."""
    walk = plan_walk(x, tensors=2)
    launch(
        kernels.backward_input_kernel, -(-walk.tiles // walk.steps) * walk.blocks, grad, x, dx, dresidual,
        *dense(mean, rstd, weight, bias, means), count, *_sides(activation, side), walk.C, walk.S, walk.tiles, walk.blocks,
        walk.steps, means.size(1), group, _num_affine(weight, bias),
        warps=walk.warps, **_activation(activation, slope), WEIGHTED_MEANS=weighted_means, **_tile(walk),
    )  # fmt: skip


def _tile(walk: Walk) -> dict[str, Any]:
    return {"ALIGN": walk.align, "CHANNELS_LAST": walk.channels_last, "ROWS": walk.rows, "COLS": walk.cols}


def _activation(name: str, slope: float) -> dict[str, Any]:
    # Constants of the kernel: an argument would be rounded to float32, also beside float64.
    return {"ACTIVATION": CODES[name], "SLOPE": slope if name == "leaky_relu" else 0.0}


def like(x: Tensor) -> Tensor:
    """An output in the layout of ``x``."""
    if x.is_contiguous():
        return empty(*x.shape, dtype=x.dtype, device=x.device)
    return empty(x.size(0), x.size(2), x.size(1), dtype=x.dtype, device=x.device).transpose(1, 2)


def _num_affine(weight: Tensor | None, bias: Tensor | None) -> int:
    vector = weight if weight is not None else bias
    return 1 if vector is None else vector.numel()


def _sides(activation: str, side: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The residual, or the mask of bits."""
    if not activation:
        return None, None
    return (None, side) if activation in _PIECEWISE_LINEAR else (side, None)
