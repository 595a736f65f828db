"""Torch's own operators for row and group norms, with a centre taken off where one of them subtracts two large numbers.

Autograd and every transform of it can record the forward functions, which take any number of dims. Where torch would keep
more than the input, the backward functions serve: for activations, and for RMS norm, which has no kernel on CPU.
"""

# M rows, D features; N batch, C channels, S flattened space, G groups

import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.autocast import without_autocast
from syncnorm.core.layout import accumulate_dtype
from syncnorm.core.traced import is_transformed
from syncnorm.kernels import reference_rows as reference

__all__ = ["group_norm_backward", "group_norm_forward", "objection", "row_norm_backward", "row_norm_forward"]

_layer_backward = torch.ops.aten.native_layer_norm_backward
_group_backward = torch.ops.aten.native_group_norm_backward


def objection(x: Tensor) -> str | None:
    """None: they serve any floating-point tensor on any device, and can be traced."""
    return None


def row_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    residual: Tensor | None = None,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``(h - mean)·rstd·weight + bias`` of each row of ``h = x + residual``; and h, mean and rstd."""
    h = x if residual is None else x + residual
    mean: Tensor | None = None
    wide, weight, bias = _one_dtype(h, weight, bias)
    if centre:
        y, mean, rstd = torch.native_layer_norm(wide, wide.shape[-1:], weight, bias, eps)
    elif part is None and (torch.is_grad_enabled() or x.device.type != "cpu") and not torch.jit.is_tracing():
        y, rstd = torch.ops.aten._fused_rms_norm(wide, wide.shape[-1:], weight, eps)
    else:
        y, rstd = _rms_norm(wide, weight, eps, part)
    return y.to(x.dtype), None if residual is None else h, mean, rstd


def row_norm_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_bias: bool,
    grad_h: Tensor | None = None,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dx = rstd·(u - ⟨u⟩ - x̂⟨u·x̂⟩) + grad_h`` with ``u = grad·weight``; Σ grad·x̂ and Σ grad over rows.

    RMS norm is layer norm about a mean of 0, whose ⟨u⟩ is given back afterwards.
    """
    if part is not None:
        return reference.row_norm_backward(grad, h, weight, mean, rstd, needs_weight, needs_bias, grad_h, part)
    wide, x, rstd = grad.to(rstd.dtype), h.to(rstd.dtype), rstd.view(-1, 1)
    gamma = torch.ones_like(x[0]) if weight is None else weight.to(rstd.dtype)
    about = torch.zeros_like(rstd) if mean is None else mean.view(-1, 1)
    wanted = [True, needs_weight, needs_bias]
    dx, dweight, dbias = _layer_backward(wide, x, x.shape[-1:], about, rstd, gamma, gamma, wanted)
    if mean is None:
        with without_autocast(wide):  # of a backward that was called within it
            products = wide @ gamma
        dx.addcmul_(rstd, products.unsqueeze(-1), value=1 / x.size(-1))
    return (dx if grad_h is None else dx.add_(grad_h)).to(h.dtype), dweight, dbias


def group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean)·rstd·weight + bias)`` in the layout of ``x``; mean and rstd, ``[N, G]``."""
    wide, weight, bias = _one_dtype(x if activation is None else x.to(accumulate_dtype(x.dtype)), weight, bias)
    if weight is None and bias is not None:  # whose backward fails in torch 2.13: "tensor does not have a device"
        weight = torch.ones_like(bias)
    if torch.compiler.is_compiling() or is_transformed():
        # The backward is torch's own, which crashes on other layouts where x needs no gradient (2.13).
        wide = wide.contiguous()
    wide, centre = _recentre(_dense(wide), num_groups)
    sizes = x.size(0), x.size(1), x.shape[2:].numel(), num_groups
    y, mean, rstd = torch.native_group_norm(wide, weight, bias, *sizes, eps)
    y = y if activation is None else activation(y)
    return y.view(x.shape).to(x.dtype), mean if centre is None else mean + centre, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = rstd·(u - ⟨u⟩ - x̂⟨u·x̂⟩)`` with ``u = g'·weight``, ``g' = grad·act'(pre)``; Σ g'·x̂ and Σ g', ``[C]``."""
    wide, x_hat = grad.to(rstd.dtype), reference.normalized_groups(x, mean, rstd)
    if activation is not None:
        wide = activation.backward(wide, reference.affine_channels(x_hat, weight, bias))
    gamma = rstd.new_ones(x.size(1)) if weight is None else weight.to(rstd.dtype)
    sizes = x.size(0), x.size(1), x.size(2), num_groups
    # x̂ is its own normalised form, so that its mean, which may be large, does not enter this kernel.
    zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    dx, dweight, dbias = _group_backward(_dense(wide), _dense(x_hat), zero, one, gamma, *sizes, [True] * 3)
    dx = dx.view(x.shape).mul_(rstd.repeat_interleave(x.size(1) // num_groups, 1).unsqueeze(-1))
    return dx.to(x.dtype), dweight, dbias


def _one_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All three as they are if their dtypes agree; else widened, since torch's operators do not take every mixture."""
    if all(vector is None or vector.dtype == x.dtype for vector in (weight, bias)):
        return x, weight, bias
    dtype = accumulate_dtype(x.dtype)
    return x.to(dtype), None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, part: int | None) -> tuple[Tensor, Tensor]:
    accumulate = accumulate_dtype(x.dtype)
    used = x[..., :part]
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # the norm has no second derivative at 0, the square has
        mean_square = used.to(accumulate).square().mean(-1)
    else:
        mean_square = torch.linalg.vector_norm(used, dim=-1, dtype=accumulate).square_().div_(used.size(-1))
    rstd = torch.rsqrt(mean_square + eps)
    y = x * rstd.unsqueeze(-1)
    return y if weight is None else y * weight, rstd


def _dense(x: Tensor) -> Tensor:
    """``x`` as torch's group norm takes it: contiguous, of 2 or 3 dims; or of 4 or 5 with channels innermost.

    Torch goes by the strides, and those of dims of one element may be anything: here they are what they would be of more.
    """
    if x.is_contiguous() or x.dim() > 5 or not x.movedim(1, -1).is_contiguous():
        return x.contiguous().flatten(2) if x.dim() > 3 else x.contiguous()
    shape = (*x.shape[:2], 1, x.size(2)) if x.dim() == 3 else x.shape
    strides, step = [0] * len(shape), 1
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        strides[dim], step = step, step * shape[dim]
    return x.as_strided(shape, strides)


def _recentre(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """Take a number near its mean off each group; the result of the norm, and every derivative, stays the same.

    ATen's CPU kernel for channels_last forms E[x²] − E[x]² in the input's precision: in float32 at mean/std = 1e3 its
    output is off by 1.6 (torch 2.13). The mean of one row will do as the number: what is lost is then at most the
    precision times the number of rows.
    """
    if x.device.type != "cpu" or not x.numel() or x.dim() < 4:
        return x, None
    row = x.detach().select(2, x.size(2) // 2).flatten(2)
    row_mean = row.mean(2, dtype=accumulate_dtype(x.dtype))
    centre_NG = row_mean.unflatten(1, (num_groups, -1)).mean(2).to(x.dtype)
    centre_NC = centre_NG.repeat_interleave(x.size(1) // num_groups, 1)
    return x - centre_NC.reshape(*centre_NC.shape, *[1] * (x.dim() - 2)), centre_NG
