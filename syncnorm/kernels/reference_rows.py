"""The meaning of the primitives of row and group norms in plain torch operations; autograd can record them, twice too."""

# M rows, D features; N batch, C channels, S flattened space, G groups

import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.layout import accumulate_dtype

__all__ = [
    "affine_channels",
    "group_norm_backward",
    "group_norm_forward",
    "group_statistics",
    "normalized_groups",
    "objection",
    "row_norm_backward",
    "row_norm_forward",
    "row_statistics",
]


def objection(x: Tensor) -> str | None:
    """None: the reference serves any floating-point tensor on any device."""
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
    mean, rstd = row_statistics(h, eps, centre, part)
    y = _normalized_rows(h, mean, rstd)
    y = y if weight is None else y * weight.to(rstd.dtype)
    y = y if bias is None else y + bias.to(rstd.dtype)
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
    """``dx = rstd·(u - ⟨u⟩ - x̂⟨u·x̂⟩) + grad_h`` with ``u = grad·weight``; Σ grad·x̂ and Σ grad over rows."""
    wide, x_hat = grad.to(rstd.dtype), _normalized_rows(h, mean, rstd)
    u = wide if weight is None else wide * weight.to(rstd.dtype)
    products = (u * x_hat).sum(-1, keepdim=True)
    if mean is not None:
        u = u - u.mean(-1, keepdim=True)
    if part is None:
        dx = rstd.unsqueeze(-1) * (u - x_hat * (products / h.size(-1)))
    else:  # the features behind the first K have no share in the mean square
        used = torch.arange(h.size(-1), device=h.device) < part
        dx = rstd.unsqueeze(-1) * (u - used * x_hat * (products / part))
    if grad_h is not None:
        dx = dx + grad_h
    dweight = (wide * x_hat).sum(0) if needs_weight else None
    return dx.to(h.dtype), dweight, wide.sum(0) if needs_bias else None


def row_statistics(h: Tensor, eps: float, centre: bool, part: int | None = None) -> tuple[Tensor | None, Tensor]:
    """Mean (None without centring) and ``1 / sqrt(var + eps)`` of each row, ``[M]``."""
    wide = h.to(accumulate_dtype(h.dtype))
    if not centre:
        return None, torch.rsqrt(wide[..., :part].square().mean(-1) + eps)
    var, mean = torch.var_mean(wide, -1, correction=0)
    return mean, torch.rsqrt(var + eps)


def group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean)·rstd·weight + bias)`` in the layout of ``x``; mean and rstd, ``[N, G]``."""
    mean, rstd = group_statistics(x, num_groups, eps)
    y = affine_channels(normalized_groups(x, mean, rstd), weight, bias)
    y = y if activation is None else activation(y)
    return y.to(x.dtype), mean, rstd


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
    wide, x_hat = grad.to(rstd.dtype), normalized_groups(x, mean, rstd)
    if activation is not None:
        wide = activation.backward(wide, affine_channels(x_hat, weight, bias))
    u = affine_channels(wide, weight, None)
    means = [t.unflatten(1, (num_groups, -1)).mean((2, 3)) for t in (u, u * x_hat)]
    mean_u, mean_ux, rstd = (_over_channels(t, x) for t in (*means, rstd))
    dx = rstd * (u - mean_u - x_hat * mean_ux)
    return dx.to(x.dtype), (wide * x_hat).sum((0, 2)), wide.sum((0, 2))


def group_statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(var + eps)`` of each group, ``[N, G]``."""
    grouped = x.to(accumulate_dtype(x.dtype)).unflatten(1, (num_groups, -1))
    var, mean = torch.var_mean(grouped, (2, 3), correction=0)
    return mean, torch.rsqrt(var + eps)


def normalized_groups(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """``(x - mean)·rstd``, in the dtype of ``rstd`` and the layout of ``x``."""
    return (x.to(rstd.dtype) - _over_channels(mean, x)) * _over_channels(rstd, x)


def affine_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x·weight + bias`` over channels."""
    x = x if weight is None else x * weight.to(x.dtype).unsqueeze(-1)
    return x if bias is None else x + bias.to(x.dtype).unsqueeze(-1)


def _normalized_rows(h: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    wide = h.to(rstd.dtype)
    return (wide if mean is None else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def _over_channels(statistic_NG: Tensor, x: Tensor) -> Tensor:
    return statistic_NG.repeat_interleave(x.size(1) // statistic_NG.size(1), 1).unsqueeze(-1)
