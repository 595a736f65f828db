"""ATen's fused CPU operators, put to work on the phases that a synchronised layer needs.

Two of them do almost everything: ``native_batch_norm`` in evaluation mode is a vectorised ``a·x + b`` per channel, and
``native_batch_norm_backward`` with only parameter gradients asked for is a vectorised Σg and Σg·(x − m). Chains of
``var_mean`` and elementwise operations compute the same 3 to 9 times slower.
"""

# N batch, C channels, S flattened space, M = N·S

from collections.abc import Iterator

import torch
from torch import Tensor

from syncnorm.core.activation import Activation, pack_bits, unpack_bits
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


def batch_normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(x - mean)·rstd·weight + bias`` as one multiply-add per element; residual and activation follow in place."""
    fused = activation is not None or residual is not None
    y = _multiply_add(_wide(x) if fused else x, mean, rstd, weight, bias)
    # Selective checkpointing may have kept y, and refuses a tensor that was written to since.
    in_place = torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    if activation is None:
        return y.to(x.dtype), None
    mask = pack_bits(y > 0) if residual is not None and activation.is_piecewise_linear else None
    return (activation.apply_(y) if in_place else activation(y)).to(x.dtype), mask


def batch_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    side: Tensor | None = None,
) -> Tensor:
    """Σg' and Σg'·x̂, float64 ``[2, C]``."""
    grad, x = _through(grad, x, mean, rstd, weight, bias, activation, side)
    accumulate = accumulate_dtype(x.dtype)
    mean, rstd = mean.to(accumulate), rstd.to(accumulate)
    _, products, total = _reduce(grad, x, None, None, None, mean, rstd, True, 0.0, [False, True, True])
    return torch.stack([total, products]).double()


def batch_backward_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    means: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    side: Tensor | None = None,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``rstd·weight·(g' - ⟨g'⟩ - x̂⟨g'·x̂⟩)`` as ``p·(x - mean) + q``, and then ``+ a·g'`` in place; and g'."""
    dtype = x.dtype
    grad, x = _through(grad, x, mean, rstd, weight, bias, activation, side)
    dx = _backward_input(grad, x, mean, rstd, weight, means)
    return dx.to(dtype), grad.to(dtype) if needs_residual and activation is not None else None


def _backward_input(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, means: Tensor
) -> Tensor:
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


def _through(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    side: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient behind the activation, g' = g·act'(pre), and ``x``; both widened where there is an activation."""
    if activation is None:
        return grad, x
    grad, x = _wide(grad), _wide(x)
    if side is not None and activation.is_piecewise_linear:
        return activation.backward_by_sign(grad, unpack_bits(side, x.shape)), x
    pre = _multiply_add(x, mean, rstd, weight, bias)
    return activation.backward(grad, pre if side is None else pre.add_(side)), x


def _multiply_add(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    accumulate = accumulate_dtype(x.dtype)
    scale = (rstd if weight is None else rstd * weight).to(accumulate)
    y: Tensor = _affine(
        x, scale, None if bias is None else bias.to(accumulate), mean.to(accumulate), torch.ones_like(scale), False, 0.0, 0.0
    )[0]  # fmt: skip
    return y


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


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
