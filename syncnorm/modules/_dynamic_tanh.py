"""Dynamic tanh as a layer, in the place of layer norm."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.functional._dynamic_tanh import dynamic_tanh

__all__ = ["DynamicTanh"]


class DynamicTanh(nn.Module):
    """``tanh(α · x) · γ + β`` in the place of layer norm; see :func:`syncnorm.functional.dynamic_tanh`.

    No statistics at all; the same in training and evaluation. It has no scale of its own: α has to suit the inputs, and
    with it the learning rate. The paper finds 0.5 good outside language models and smaller ones for wide language models.

    Args:
        dim: D, the number of features.
        alpha: α at first.
        elementwise_affine: Learn a weight and a bias per feature.
        device: Of the parameters.
        dtype: Of the parameters.
        channel_dim: Where the features are, if not last: 1 for ``[N, C, *]``.

    Shape:
        Input ``[*, D]``, or with D at ``channel_dim``; output the same.

    Example:
        >>> DynamicTanh(16)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Reference: Zhu, Chen, He, LeCun & Liu (2025).
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        alpha: float = 0.5,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        self.dim, self.channel_dim, self._first_alpha = dim, channel_dim, float(alpha)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        for name in ("weight", "bias"):
            made = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if elementwise_affine else None
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what was learned."""
        for parameter, value in ((self.alpha, self._first_alpha), (self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        if input.size(self.channel_dim) != self.dim:
            raise ValueError(
                f"DynamicTanh: expected {self.dim} features in dim {self.channel_dim}, got an input {list(input.shape)}. "
                "channel_dim says where the features are."
            )
        return dynamic_tanh(input, self.alpha, self.weight, self.bias, channel_dim=self.channel_dim)

    def extra_repr(self) -> str:
        affine = "" if self.weight is not None else ", elementwise_affine=False"
        return f"{self.dim}{affine}" + ("" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}")
