"""EvoNorm-S0 as a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.functional._evo_norm import evo_norm_s0
from syncnorm.functional._group_norm import check_groups

__all__ = ["EvoNormS0"]


class EvoNormS0(nn.Module):
    """Normalise and activate in one, sample by sample; see :func:`syncnorm.functional.evo_norm_s0`.

    Takes the place of a norm *and* the activation behind it. Does not depend on the batch; the same in training and
    evaluation.

    Args:
        num_features: C, the size of dim 1 of the input.
        num_groups: G, a divisor of C.
        eps: Added to the variance.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If G does not divide C.

    Example:
        >>> EvoNormS0(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])

    Reference: Liu, Brock, Simonyan & Le (2020), EvoNorm-S0.
    """

    def __init__(
        self, num_features: int, num_groups: int = 32, eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_groups("EvoNormS0", num_features, num_groups)
        self.num_features, self.num_groups, self.eps = num_features, num_groups, eps
        self.weight, self.bias, self.v = (
            nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what was learned."""
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0), (self.v, 1.0)):
            nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        return evo_norm_s0(input, self.num_groups, self.v, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"
