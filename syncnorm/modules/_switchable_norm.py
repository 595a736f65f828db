"""Switchable norm layers: instance, layer and synchronised batch statistics in a learned mixture."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.distributed.groups import LOCAL, Group
from syncnorm.functional._switchable_norm import switchable_norm
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["SwitchableNorm1d", "SwitchableNorm2d", "SwitchableNorm3d"]

_PARTS = ("instance", "layer", "batch")


class _SwitchableNorm(MixedStatistics):
    """Normalise by a learned mixture of instance, layer and batch statistics; see ``functional.switchable_norm``.

    The layer learns how much each of the three counts, for the mean and for the variance apart: with small batches the
    weight moves away from the batch. Batch statistics are those of all ranks, and are replaced by running ones in
    evaluation. Maps of a single value are fine.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the mixed variance.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation. Without them evaluation uses the batch of this rank.
        process_group: Which ranks share batch statistics, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers. Running statistics stay as wide as they are under ``.half()`` and ``.bfloat16()``.
        bias: With ``affine``, whether to learn the bias too.
        using_bn: False mixes instance and layer statistics only: no ranks meet and nothing is tracked.

    Attributes:
        mean_logits: ``[3]`` (``[2]`` without batch statistics), 1 at first; their softmax is the mixture of the means.
        var_logits: Likewise, of the variances.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If an input does not fit.
        TypeError: If an input is not floating point.
        SyncNormError: As :class:`syncnorm.SyncBatchNorm`.

    Reference: Luo et al. (2019), arXiv:1806.10779, equations 3 to 5.
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
        using_bn: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats and using_bn,
            process_group,
            device,
            dtype,
            bias=bias,
        )
        logits = torch.ones(3 if using_bn else 2, device=device, dtype=dtype)
        self.mean_logits, self.var_logits = nn.Parameter(logits), nn.Parameter(logits.clone())

    @property
    def using_bn(self) -> bool:
        """Whether batch statistics are part of the mixture."""
        return self.mean_logits.numel() == 3

    def _group(self) -> Group:
        return super()._group() if self.using_bn else LOCAL

    @property
    def mean_weights(self) -> dict[str, Tensor]:
        """Share of each statistic in the mean, by name, as scalars to log; they add up to 1."""
        return _shares(self.mean_logits)

    @property
    def var_weights(self) -> dict[str, Tensor]:
        """Share of each statistic in the variance, by name, as scalars to log; they add up to 1."""
        return _shares(self.var_logits)

    def reset_parameters(self) -> None:
        """Forget what was learned, and all batches: the statistics count alike again."""
        super().reset_parameters()
        nn.init.ones_(self.mean_logits)
        nn.init.ones_(self.var_logits)

    def _normalize(self, input: Tensor) -> Tensor:
        return switchable_norm(
            input,
            self.mean_logits,
            self.var_logits,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
            **self._statistics(),
        )

    def extra_repr(self) -> str:
        """The fields of the base, and ``using_bn`` where it is off."""
        return super().extra_repr() + ("" if self.using_bn else ", using_bn=False")


def _shares(logits: Tensor) -> dict[str, Tensor]:
    shares = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
    return dict(zip(_PARTS, shares.unbind(), strict=False))


class SwitchableNorm1d(_SwitchableNorm):
    __doc__ = _SwitchableNorm.__doc__
    input_dims = (2, 3)


class SwitchableNorm2d(_SwitchableNorm):
    __doc__ = _SwitchableNorm.__doc__
    input_dims = (4,)


class SwitchableNorm3d(_SwitchableNorm):
    __doc__ = _SwitchableNorm.__doc__
    input_dims = (5,)
