"""Frozen batch norm layers: a fixed affine map, from and back to batch norm with nothing lost."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.distributed.groups import LOCAL, Group
from syncnorm.errors import SyncNormError
from syncnorm.functional._frozen_batch_norm import frozen_batch_norm
from syncnorm.modules._statistics import SyncStatistics

__all__ = ["FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d"]


class _FrozenBatchNorm(SyncStatistics):
    """Batch norm whose statistics and affine parameters do not move, whatever mode the model is in.

    For fine-tuning detectors and segmenters with tiny batches. ``train()`` and ``eval()`` change nothing in what it
    computes; weight and bias stay parameters under batch norm's keys, with ``requires_grad`` off. A layer made here is the
    identity (running_var = 1 - eps) until a state dict is loaded.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the variance.
        affine: Have a weight and a bias per channel.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If an input does not fit.
        TypeError: If an input is not floating point.
        SyncNormError: If the layer has no running statistics.
    """

    family = "frozen_batch_norm"
    _required_grad: dict[str, bool]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine=affine, device=device, dtype=dtype)
        self._arrive()

    def _arrive(self) -> None:
        self._required_grad = {name: p.requires_grad for name, p in self.named_parameters(recurse=False)}
        self.requires_grad_(False)

    def _leave(self) -> None:
        for name, required in self._required_grad.items():
            self.get_parameter(name).requires_grad_(required)
        del self._required_grad

    def reset_running_stats(self) -> None:
        """The identity again, up to weight and bias: mean 0, variance 1 - eps."""
        super().reset_running_stats()
        if self.running_var is not None:
            self.running_var.fill_(1 - self.eps)

    def _group(self) -> Group:
        return LOCAL  # a fixed map meets nobody

    def _normalize(self, input: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            raise SyncNormError("a frozen batch norm is its running statistics, and this layer has none.")
        return frozen_batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.eps, input_dims=self.input_dims
        )


class FrozenBatchNorm1d(_FrozenBatchNorm, nn.BatchNorm1d):
    __doc__ = _FrozenBatchNorm.__doc__
    reverts_to = nn.BatchNorm1d
    input_dims = (2, 3)


class FrozenBatchNorm2d(_FrozenBatchNorm, nn.BatchNorm2d):
    __doc__ = _FrozenBatchNorm.__doc__
    reverts_to = nn.BatchNorm2d
    input_dims = (4,)


class FrozenBatchNorm3d(_FrozenBatchNorm, nn.BatchNorm3d):
    __doc__ = _FrozenBatchNorm.__doc__
    reverts_to = nn.BatchNorm3d
    input_dims = (5,)
