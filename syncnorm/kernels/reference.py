"""The meaning of each primitive in plain torch operations: runs on any device and can be traced.

Inside ``torch.compile`` this is what Inductor fuses with its neighbours.
"""

# N batch, C channels, S flattened space, M = N·S

import torch
from torch import Tensor

from syncnorm.core.activation import Activation, pack_bits, unpack_bits
from syncnorm.core.layout import accumulate_dtype, channel_view, count_per_channel
from syncnorm.core.moments import Moments

__all__ = ["batch_backward_input", "batch_backward_reduce", "batch_moments", "batch_normalize", "objection"]


def objection(x: Tensor) -> str | None:
    """None: the reference serves any floating-point tensor on any device."""
    return None


def batch_moments(x: Tensor) -> Moments:
    """Count, mean and M2 per channel of flat ``x``."""
    accumulate = accumulate_dtype(x.dtype)
    count = count_per_channel(x)
    var, mean = torch.var_mean(x.to(accumulate), _reduced(x), correction=0)
    return Moments(float(count), mean.double(), var.double() * count)


def batch_normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``act((x - mean)·rstd·weight + bias + residual)``, and the mask where the backward needs one."""
    y = _pre_activation(x, mean, rstd, weight, bias, residual)
    if activation is None:
        return y.to(x.dtype), None
    mask = pack_bits(y > 0) if residual is not None and activation.is_piecewise_linear else None
    return activation(y).to(x.dtype), mask


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
    accumulate = accumulate_dtype(x.dtype)
    grad = _through(grad, x, mean, rstd, weight, bias, activation, side)
    centred = x.to(accumulate) - channel_view(mean.to(accumulate), x)
    sums = torch.stack([grad.sum(_reduced(x)), (grad * centred).sum(_reduced(x))]).double()
    return torch.stack([sums[0], sums[1] * rstd])


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
    """``rstd·weight·(g' - ⟨g'⟩ - x̂⟨g'·x̂⟩)``, and g' for the residual."""
    accumulate = accumulate_dtype(x.dtype)
    grad = _through(grad, x, mean, rstd, weight, bias, activation, side)
    scale = rstd if weight is None else rstd * weight.double()
    mean_g, slope = means[0], means[1] * rstd
    mean_v, scale_v, mean_g_v, slope_v = (channel_view(v.to(accumulate), x) for v in (mean, scale, mean_g, slope))
    dx = (grad - mean_g_v - (x.to(accumulate) - mean_v) * slope_v) * scale_v
    return dx.to(x.dtype), grad.to(x.dtype) if needs_residual and activation is not None else None


def _pre_activation(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    # Subtracting first: no cancellation where the mean is large.
    accumulate = accumulate_dtype(x.dtype)
    scale = rstd if weight is None else rstd * weight.double()
    y = (x.to(accumulate) - channel_view(mean.to(accumulate), x)) * channel_view(scale.to(accumulate), x)
    if bias is not None:
        y = y + channel_view(bias.to(accumulate), x)
    return y if residual is None else y + residual.to(accumulate)


def _through(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    side: Tensor | None,
) -> Tensor:
    """The gradient behind the activation, g' = g·act'(pre), in the dtype of sums."""
    grad = grad.to(accumulate_dtype(x.dtype))
    if activation is None:
        return grad
    if side is not None and activation.is_piecewise_linear:
        return activation.backward_by_sign(grad, unpack_bits(side, x.shape))
    return activation.backward(grad, _pre_activation(x, mean, rstd, weight, bias, side))


def _reduced(x: Tensor) -> tuple[int, ...]:
    return (0, 2) if x.dim() == 3 else (0,)
