"""ATen's fused CPU operators, put to work on the phases that a synchronised layer needs.

Two of them do almost everything: ``native_batch_norm`` in evaluation mode is a vectorised ``a·x + b`` per channel, and
``native_batch_norm_backward`` with only parameter gradients asked for is a vectorised Σg and Σg·(x − m). Chains of
``var_mean`` and elementwise operations compute the same 3 to 9 times slower.
"""

# N batch, C channels, S flattened space, M = N·S

import torch
from torch import Tensor

from syncnorm.core.layout import accumulate_dtype, channel_view, count_per_channel
from syncnorm.core.moments import Moments

__all__ = ["batch_backward_input", "batch_backward_reduce", "batch_moments", "batch_normalize", "objection"]

# Elements handled at a time where one pass writes what the next one reads: 1 MiB of float32 stays in a core's L2 cache.
_BLOCK = 1 << 18

_affine = torch.ops.aten.native_batch_norm
_affine_out = torch.ops.aten.native_batch_norm.out
_reduce = torch.ops.aten.native_batch_norm_backward


def objection(x: Tensor) -> str | None:
    """Why these operators cannot serve ``x``."""
    if x.device.type != "cpu":
        return f"ATen's fused operators used here exist on CPU only, the input is on {x.device}."
    if torch.compiler.is_compiling():
        return "inside torch.compile the traceable reference is used, which Inductor can fuse."
    return None


def batch_moments(x: Tensor) -> Moments:
    """Count, mean and M2 per channel: a first pass for the mean, a second for the squared deviations from it.

    The deviations are formed before they are squared, block by block in cache, and what the first mean lacks is corrected:
    in float32 the variance at mean/std = 1e4 is as good as torch's double-precision loop, and faster.
    """
    accumulate = accumulate_dtype(x.dtype)
    count = count_per_channel(x)
    rows = x.sum(2, dtype=accumulate) if x.dim() == 3 else x.sum(0, keepdim=True, dtype=accumulate)
    pivot = (rows.sum(0, dtype=torch.float64) / count).to(accumulate)
    zero, one = _zeros_and_ones(pivot)
    pivot_v = channel_view(pivot, x)
    sums = torch.zeros(2, pivot.numel(), dtype=torch.float64)
    scratch: Tensor | None = None
    for block in _blocks(x):
        scratch = torch.empty_like(block, dtype=accumulate) if scratch is None else scratch[: block.size(0)]
        torch.sub(block, pivot_v, out=scratch)
        _, squares, total = _reduce(scratch, scratch, None, None, None, zero, one, True, 0.0, [False, True, True])
        sums[0] += total
        sums[1] += squares
    shift = sums[0] / count
    count_tensor = torch.full((), float(count), dtype=torch.float64)
    return Moments(count_tensor, pivot + shift, (sums[1] - sums[0] * shift).clamp_(min=0))


def batch_normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean)·rstd·weight + bias`` as one multiply-add per element."""
    scale, shift = _multiply_add(mean, rstd, weight, bias, accumulate_dtype(x.dtype))
    zero, one = _zeros_and_ones(scale)
    y: Tensor = _affine(x, scale, shift, zero, one, False, 0.0, 0.0)[0]
    return y


def batch_backward_reduce(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Σg and Σg·x̂, float64 ``[2, C]``."""
    mean = mean.to(accumulate_dtype(x.dtype))
    one = torch.ones_like(mean)
    _, products, total = _reduce(grad, x, None, None, None, mean, one, True, 0.0, [False, True, True])
    return torch.stack([total.double(), products.double() * rstd])


def batch_backward_input(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, means: Tensor
) -> Tensor:
    """``rstd·weight·(g - ⟨g⟩ - x̂⟨g·x̂⟩)`` as ``a·g + (p·x + q)``: two multiply-adds per block, the second in cache."""
    accumulate = accumulate_dtype(x.dtype)
    scale = rstd if weight is None else rstd * weight.double()
    p = -scale * rstd * means[1]
    q = (-scale * means[0] - p * mean).to(accumulate)
    p, scale_v = p.to(accumulate), channel_view(scale.to(accumulate), x)
    zero, one = _zeros_and_ones(p)
    dx = torch.empty_like(x)
    exact = x.dtype == accumulate
    for x_block, grad_block, dx_block in zip(_blocks(x), _blocks(grad), _blocks(dx), strict=True):
        # Half-precision blocks are widened, so that the sum is rounded once.
        target = dx_block if exact else torch.empty_like(dx_block, dtype=accumulate)
        _affine_out(
            x_block if exact else x_block.to(accumulate), p, q, zero, one, False, 0.0, 0.0,
            out=target, save_mean=zero.new_empty(0), save_invstd=zero.new_empty(0),
        )  # fmt: skip
        target.addcmul_(grad_block if exact else grad_block.to(accumulate), scale_v)
        if not exact:
            dx_block.copy_(target)
    return dx


def _multiply_add(
    mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scale = rstd if weight is None else rstd * weight.double()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    return scale.to(dtype), shift.to(dtype)


def _zeros_and_ones(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like), torch.ones_like(like)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _BLOCK * x.size(0) // x.numel()))
