"""Filter response norm and its thresholded linear unit, as layers."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.functional._filter_response_norm import filter_response_norm, thresholded_linear_unit

__all__ = ["TLU", "FilterResponseNorm"]


class FilterResponseNorm(nn.Module):
    """Divide each channel of each sample by its RMS over space; see :func:`syncnorm.functional.filter_response_norm`.

    Does not depend on the batch; the same in training and evaluation. It is meant to be followed by a :class:`TLU`, in the
    place of a ReLU, because without centring activations can sit away from zero.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: ε, or its constant part.
        learnable_eps: Learn ε = eps + abs(ε_l), one ε_l for the layer, from 1e-4. For inputs without spatial extent
            (1×1 maps, ``[N, C]``), where the paper needs it.
        device: Of the parameters.
        dtype: Of the parameters.
        tlu: Have the TLU inside, its τ as the parameter ``threshold``.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If eps is negative, or is 0 without a learnable part.

    Example:
        >>> nn.Sequential(nn.Conv2d(3, 8, 3), FilterResponseNorm(8), TLU(8))(torch.randn(1, 3, 5, 5)).shape
        torch.Size([1, 8, 3, 3])

    Reference: Singh & Krishnan (2020), section 3.
    """

    weight: Tensor
    bias: Tensor
    learned_eps: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        learnable_eps: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        tlu: bool = False,
    ) -> None:
        super().__init__()
        if eps < 0 or (eps == 0 and not learnable_eps):
            raise ValueError(f"FilterResponseNorm: eps must be positive, got {eps}. The paper uses 1e-6.")
        self.num_features, self.eps = num_features, eps
        sizes = {"weight": num_features, "bias": num_features}
        sizes |= {"learned_eps": 1 if learnable_eps else 0, "threshold": num_features if tlu else 0}
        for name, size in sizes.items():
            made = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if size else None
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what was learned."""
        for name, value in (("weight", 1.0), ("bias", 0.0), ("learned_eps", 1e-4), ("threshold", 0.0)):
            if (parameter := getattr(self, name)) is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        return filter_response_norm(
            input, self.weight, self.bias, self.eps, learned_eps=self.learned_eps, threshold=self.threshold
        )

    def extra_repr(self) -> str:
        learnable = "" if self.learned_eps is None else ", learnable_eps=True"
        return f"{self.num_features}, eps={self.eps}{learnable}" + ("" if self.threshold is None else ", tlu=True")


class TLU(nn.Module):
    """Thresholded linear unit ``max(y, τ)`` with a learned τ per channel, 0 at first: a ReLU that can move.

    Args:
        num_features: C, the size of dim 1 of the input.
        device: Of τ.
        dtype: Of τ.

    Shape:
        Input ``[N, C, *]``; output the same.

    Reference: Singh & Krishnan (2020), section 3.
    """

    def __init__(self, num_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.threshold = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what was learned."""
        nn.init.zeros_(self.threshold)

    def forward(self, input: Tensor) -> Tensor:
        return thresholded_linear_unit(input, self.threshold)

    def extra_repr(self) -> str:
        return str(self.num_features)
