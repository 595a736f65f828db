"""ATen's fused CPU operators, put to work on the phases that a synchronised layer needs.

Two of them do almost everything: ``native_batch_norm`` in evaluation mode is a vectorised ``a·x + b`` per channel, and
``native_batch_norm_backward`` with only parameter gradients asked for is a vectorised Σg and Σg·(x − m). Chains of
``var_mean`` and elementwise operations compute the same 3 to 9 times slower.
"""

# N batch, C channels, S flattened space, M = N·S

from collections.abc import Iterator

import torch
from torch import Tensor

from syncnorm.core.layout import accumulate_dtype, channel_view, count_per_channel
from syncnorm.core.moments import Moments

__all__ = ["batch_backward_input", "batch_backward_reduce", "batch_moments", "batch_normalize", "objection"]

# Elements handled at a time where one pass writes what the next one reads: 1 MiB of float32 stays in a core's L2 cache.
_BLOCK = 1 << 18

# Longest run summed in float32 alone, where roundings add up to about sqrt(4096)·2^-25 = 2e-6.
_RUN = 1 << 12

# One in so many values makes the pivot about which moments are summed.
_PIVOT_STEP = 16

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
    """Count, mean and M2 per channel, read once from memory, block by block in cache.

    What is summed are deviations from a pivot, the mean of a sixteenth of the values; what the pivot lacks is corrected
    afterwards. Any sixteenth will do: if its mean is D away from the mean of all, the variance of all is at least D²/15, so
    that the correction takes away at most 15/16 of the sum of squares, a loss of 4 bits where E[x²] - E[x]² loses all of
    them. Torch's own channels-last loop has no such bound: its variance is off by 5e-3 at mean/std = 1e4.
    """
    accumulate = accumulate_dtype(x.dtype)
    count = float(count_per_channel(x))
    some = x[::_PIVOT_STEP] if x.dim() == 2 else x[:, :, : -(-x.size(2) // _PIVOT_STEP)]
    pivot = some.sum(0 if x.dim() == 2 else (0, 2), dtype=accumulate).div_(count_per_channel(some))
    pivot_v = channel_view(pivot, x)
    zero, one = torch.zeros_like(pivot), torch.ones_like(pivot)
    total = squares = zero.double()
    scratch: Tensor | None = None
    for block in _cache_blocks(x):
        if scratch is None or scratch.shape != block.shape:
            scratch = torch.empty(block.shape, dtype=accumulate)
        torch.sub(block, pivot_v, out=scratch)
        _, block_squares, block_total = _reduce(
            scratch, scratch, None, None, None, zero, one, True, 0.0, [False, True, True]
        )  # fmt: skip
        total, squares = total + block_total, squares + block_squares
    shift = total / count
    return Moments(count, shift + pivot, squares.addcmul_(total, shift, value=-1).clamp_(min=0))


def batch_normalize(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean)·rstd·weight + bias`` as one multiply-add per element."""
    accumulate = accumulate_dtype(x.dtype)
    scale = (rstd if weight is None else rstd * weight).to(accumulate)
    y: Tensor = _affine(
        x, scale, None if bias is None else bias.to(accumulate), mean.to(accumulate), torch.ones_like(scale), False, 0.0, 0.0
    )[0]  # fmt: skip
    return y


def batch_backward_reduce(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Σg and Σg·x̂, float64 ``[2, C]``."""
    accumulate = accumulate_dtype(x.dtype)
    mean, rstd = mean.to(accumulate), rstd.to(accumulate)
    _, products, total = _reduce(grad, x, None, None, None, mean, rstd, True, 0.0, [False, True, True])
    return torch.stack([total, products]).double()


def batch_backward_input(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, means: Tensor
) -> Tensor:
    """``rstd·weight·(g - ⟨g⟩ - x̂⟨g·x̂⟩)`` as ``p·(x - mean) + q``, and then ``+ a·g`` in place."""
    accumulate = accumulate_dtype(x.dtype)
    scale = rstd if weight is None else rstd * weight
    q, p = (-scale * means).unbind(0)
    arguments = ((p * rstd).to(accumulate), q.to(accumulate), mean.to(accumulate))
    factor = channel_view(scale.to(accumulate), x)
    dx = torch.empty_like(x)
    if x.dtype == accumulate:
        return _multiply_add_out(x, *arguments, out=dx).addcmul_(grad, factor)
    # Half-precision blocks are widened, so that the sum is rounded once.
    for x_block, grad_block, dx_block in zip(_cache_blocks(x), _cache_blocks(grad), _cache_blocks(dx), strict=True):
        wide = x_block.to(accumulate)
        dx_block.copy_(_multiply_add_out(wide, *arguments, out=wide).addcmul_(grad_block.to(accumulate), factor))
    return dx


def _multiply_add_out(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, *, out: Tensor) -> Tensor:
    unused = scale.new_empty(0)
    _affine_out(
        x, scale, shift, mean, torch.ones_like(scale), False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused
    )  # fmt: skip
    return out


def _cache_blocks(x: Tensor) -> Iterator[Tensor]:
    """Pieces of flat ``x`` of about ``_BLOCK`` elements: whole samples, or parts of one where a sample is larger."""
    columns = x.size(2) if x.dim() == 3 else 1
    width = max(min(columns, _RUN, _BLOCK // x.size(1)), 1)
    for part in x.split(width, 2) if width < columns else (x,):
        rows = _BLOCK // (x.size(1) * width)
        yield from part.split(max(1, min(rows, _RUN) if x.dim() == 2 else rows))
