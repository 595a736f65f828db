"""First and second derivative of batch normalisation over any partition of the batch, written from the formulas.

Notation: s = (σ²+ε)^(-1/2), x̂ = s(x−μ), ⟨u⟩ the mean of u over all samples of all ranks, P u = u − ⟨u⟩ − x̂⟨u x̂⟩.
The whole first backward is dx = γ s P g. Sums over ranks are the caller's: each function takes or gives local sums.
"""

# C channels; flat tensors are [N, C, S] or [M, C]

import torch
from torch import Tensor

from syncnorm.core.layout import channel_view

__all__ = ["double_backward_input", "double_backward_sums", "sum_per_channel"]


def sum_per_channel(flat: Tensor) -> Tensor:
    """Sum of ``flat`` over everything but channels, float64 ``[C]``."""
    return flat.sum((0, 2) if flat.dim() == 3 else 0, dtype=torch.float64)


def double_backward_sums(v: Tensor, a: Tensor, g: Tensor, x_hat: Tensor) -> Tensor:
    """The local part of the five sums that the second derivative needs, float64 ``[5, C]``.

    Args:
        v: Cotangent of dx, flat.
        a: Cotangent of this rank's dγ, ``[C]``. It differs between ranks: DDP's parameter gradients are local.
        g: The output gradient of the first backward, flat.
        x_hat: Normalised input, flat.

    Returns:
        Σv, Σv·x̂, Σv·g, Σa·g, Σa·g·x̂.
    """
    ag = channel_view(a, g) * g
    return torch.stack([sum_per_channel(u) for u in (v, v * x_hat, v * g, ag, ag * x_hat)])


def double_backward_input(
    v: Tensor, a: Tensor, b: Tensor, g: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of (g, x, γ) given those of (dx, dγ, dβ).

    With T = ⟨vg⟩ − ⟨v⟩⟨g⟩ − ⟨v x̂⟩⟨g x̂⟩ and h = −γ s(v⟨g x̂⟩ + g⟨v x̂⟩) + a g:

        ∂/∂g = γ s P v + a x̂ + b,   ∂/∂γ = s Σ_local v·P g,   ∂/∂x = s P h − γ s² T x̂

    Args:
        v: Cotangent of dx, flat.
        a: Cotangent of this rank's dγ, ``[C]``.
        b: Cotangent of this rank's dβ, ``[C]``.
        g: The output gradient of the first backward, flat.
        x_hat: Normalised input, flat.
        rstd: s, ``[C]``.
        weight: γ, ``[C]``.
        means: ⟨g⟩, ⟨g x̂⟩ and the five sums of :func:`double_backward_sums` as global means, ``[7, C]``.

    Returns:
        Flat cotangent of g, flat cotangent of x, and of γ ``[C]``.
    """
    per_channel = [channel_view(u, g) for u in (a, b, rstd, weight, *means)]
    a, b, s, gamma, mean_g, mean_gx, mean_v, mean_vx, mean_vg, mean_ag, mean_agx = per_channel
    projected_v = v - mean_v - x_hat * mean_vx
    projected_g = g - mean_g - x_hat * mean_gx
    t = mean_vg - mean_v * mean_g - mean_vx * mean_gx
    h = -gamma * s * (v * mean_gx + g * mean_vx) + a * g
    mean_h = -gamma * s * (mean_v * mean_gx + mean_g * mean_vx) + mean_ag
    mean_hx = -2 * gamma * s * mean_vx * mean_gx + mean_agx
    grad_g = gamma * s * projected_v + a * x_hat + b
    grad_x = s * (h - mean_h - x_hat * mean_hx) - gamma * s * s * t * x_hat
    grad_weight = rstd * sum_per_channel(v * projected_g)
    return grad_g, grad_x, grad_weight
