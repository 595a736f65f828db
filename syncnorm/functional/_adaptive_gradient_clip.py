"""Adaptive gradient clipping: a filter's gradient may be so large as its weight allows."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["adaptive_gradient_clip_"]


@torch.no_grad()
def adaptive_gradient_clip_(
    parameters: Iterable[Tensor] | Tensor, clip_factor: float = 0.01, eps: float = 1e-3
) -> Tensor | None:
    """Scale down, in place, every unit's gradient whose norm exceeds ``clip_factor · max(‖w‖, eps)``.

    A unit is a slice along dim 0: the filter of one output channel, the row of a linear layer. A vector or scalar is one
    unit. (In transposed convolutions dim 0 is the input channel; so it is here.) Gradients within the bound, and those of
    parameters without one, are left alone; a second call changes no more than rounding.

    Args:
        parameters: Parameters with dense gradients; those without a gradient are skipped.
        clip_factor: λ. Smaller for larger batches; the paper uses 0.01 at 4096 and leaves the last linear layer out.
        eps: What counts as the norm of a smaller weight, so that a zero weight can leave zero.

    Returns:
        The share of units that were clipped, a scalar tensor on the device of the first gradient; None if there was no
        gradient.

    Raises:
        ValueError: If ``clip_factor`` or ``eps`` is not positive.
        TypeError: For a sparse gradient.

    Reference: Brock, De, Smith & Simonyan (2021), equation 3.
    """
    for name, value in (("clip_factor", clip_factor), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"adaptive_gradient_clip_: {name} must be positive, got {value}.")
    clipped: list[Tensor] = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        grad = parameter.grad
        if grad is None or not grad.numel():
            continue
        if grad.layout != torch.strided:
            raise TypeError(
                f"adaptive_gradient_clip_: expected dense gradients, got {grad.layout} for a parameter "
                f"{list(parameter.shape)}. Leave such parameters out."
            )
        bound = clip_factor * _unit_norm(parameter).clamp(min=eps)
        norm = _unit_norm(grad)
        too_large = norm > bound
        # where, not a product with 1: gradients within the bound keep their bits, and 0 / 0 stays away
        scale = torch.where(too_large, bound / norm, torch.ones_like(norm))
        grad.copy_(torch.where(too_large, grad * scale, grad))
        clipped.append(too_large.flatten())
    if not clipped:
        return None
    return torch.cat([part.to(clipped[0].device) for part in clipped]).float().mean()


def _unit_norm(tensor: Tensor) -> Tensor:
    """The norm of each unit, in at least float32, of a shape that broadcasts over ``tensor``."""
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    norm: Tensor = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
    return norm
