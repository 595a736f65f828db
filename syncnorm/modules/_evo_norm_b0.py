"""EvoNorm-B0 as a layer, its batch variance over all ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.functional._evo_norm_b0 import evo_norm_b0
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["EvoNormB0"]


class EvoNormB0(MixedStatistics):
    """Normalise and activate in one, by the batch's and the sample's variance; see ``functional.evo_norm_b0``.

    Takes the place of a norm *and* the activation behind it. Maps of one value, and batches of one, are fine.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the variances.
        momentum: Weight of the new batch in the running variance; None for the cumulative average.
        affine: Learn a weight and a bias per channel, beside v.
        track_running_stats: Keep a running variance for evaluation. Without it evaluation uses the batch of this rank.
        process_group: Which ranks share the batch variance, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers. The running variance stays as wide as it is under ``.half()`` and ``.bfloat16()``.
        bias: With ``affine``, whether to learn the bias too.

    Attributes:
        v: ``[C]``, 1 at first: slope in the denominator.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If an input does not fit.
        TypeError: If an input is not floating point.
        SyncNormError: As :class:`syncnorm.SyncBatchNorm`.

    Example:
        >>> EvoNormB0(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])

    Reference: Liu, Brock, Simonyan & Le (2020), arXiv:2004.02967, table 1, EvoNorm-B0.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: object = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias=bias
        )
        self.running_mean = None  # x is not centred
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Forget what was learned, and all batches."""
        super().reset_parameters()
        nn.init.ones_(self.v)

    def _normalize(self, input: Tensor) -> Tensor:
        return evo_norm_b0(
            input,
            self.v,
            self.weight,
            self.bias,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
            **self._statistics(),
        )
