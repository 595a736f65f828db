"""Batch-instance norm layers, their batch part over all ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.core.traced import is_transformed
from syncnorm.functional._batch_instance_norm import batch_instance_norm
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["BatchInstanceNorm1d", "BatchInstanceNorm2d", "BatchInstanceNorm3d"]


class _BatchInstanceNorm(MixedStatistics):
    """Batch norm and instance norm in a share that each channel learns; see ``functional.batch_instance_norm``.

    A channel in which style is noise goes to instance norm (ρ = 0), one in which it tells classes apart to batch norm
    (ρ = 1, where all begin). The batch part is synchronised over ranks. Every training forward first brings ρ back into
    [0, 1], where the last optimizer step may have left it, as in the paper; the paper also gives ρ a larger learning rate.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the variances.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        affine: Learn a weight and a bias per channel, beside ρ.
        track_running_stats: Keep running statistics for evaluation. Without them evaluation uses the batch of this rank.
        process_group: Which ranks share batch statistics, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers. Running statistics stay as wide as they are under ``.half()`` and ``.bfloat16()``.
        bias: With ``affine``, whether to learn the bias too.

    Attributes:
        rho: ``[C]``, 1 at first: the share of batch norm.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If an input does not fit, or the whole group has one value per channel when training.
        TypeError: If an input is not floating point.
        SyncNormError: As :class:`syncnorm.SyncBatchNorm`.

    Reference: Nam & Kim (2018), arXiv:1805.07925, equations 3 and 4.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
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
        self.rho = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Forget what was learned, and all batches: the layer is batch norm again."""
        super().reset_parameters()
        nn.init.ones_(self.rho)

    def _normalize(self, input: Tensor) -> Tensor:
        if self.training and not is_transformed():  # torch.func's refuse it, and it changes no result
            # Through .data: a forward that is still to have its backward has saved ρ, with the values it keeps here.
            self.rho.data.clamp_(0, 1)
        return batch_instance_norm(
            input,
            self.rho,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
            **self._statistics(),
        )


class BatchInstanceNorm1d(_BatchInstanceNorm):
    __doc__ = _BatchInstanceNorm.__doc__
    input_dims = (2, 3)


class BatchInstanceNorm2d(_BatchInstanceNorm):
    __doc__ = _BatchInstanceNorm.__doc__
    input_dims = (4,)


class BatchInstanceNorm3d(_BatchInstanceNorm):
    __doc__ = _BatchInstanceNorm.__doc__
    input_dims = (5,)
