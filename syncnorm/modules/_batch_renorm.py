"""Batch renormalisation layers over all ranks, with the state of torch's batch norm."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.distributed.groups import LOCAL
from syncnorm.errors import SyncNormError
from syncnorm.functional._batch_renorm import batch_renorm
from syncnorm.modules._statistics import SyncStatistics

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]


class _BatchRenorm(SyncStatistics):
    """Batch renormalisation over all ranks: batch norm for small or unrepresentative batches.

    The training output is pulled towards what evaluation would give: y = γ(x̂·r + d) + β, with r and d the distance of the
    batch's statistics from the running ones, clipped to ``r_max`` and ``d_max`` and constant to the gradient. With
    r_max = 1 and d_max = 0 it is batch norm, which is how training should begin, because the running statistics mean
    nothing yet: the paper does so for 5,000 steps and then widens the limits to 3 (until step 40,000) and 5 (until 25,000).
    Set ``r_max`` and ``d_max`` between steps.

    The state-dict keys are those of ``nn.BatchNorm*``, with a running variance where the paper has a running standard
    deviation. Evaluation is batch norm's.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the variances.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        affine: Learn a weight and a bias per channel.
        process_group: Which ranks share statistics, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        r_max: Largest correction of the scale, at least 1.
        d_max: Largest correction of the mean, in standard deviations, at least 0.
        bias: With ``affine``, whether to learn the bias too.
        backend: Kernel backend, as in :class:`syncnorm.SyncBatchNorm`.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: As :class:`syncnorm.SyncBatchNorm`; or for limits out of range.
        SyncNormError: As :class:`syncnorm.SyncBatchNorm`; or if running statistics are taken away while training.

    Reference: Ioffe (2017), arXiv:1702.03275, algorithm 1.
    """

    family = "batch_renorm"
    _limits: Tensor
    _given: tuple[float, float]  # what was set, for limits on the meta device
    _clip_rate: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.01,
        affine: bool = True,
        process_group: object = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, True, process_group, device, dtype, bias=bias, backend=backend
        )
        self._arrive(r_max, d_max)

    def _arrive(self, r_max: float = 3.0, d_max: float = 5.0) -> None:
        # Tensors, so that a schedule causes neither recompilation nor a host sync; not persistent, so that the state dict
        # stays that of batch norm.
        assert self.running_mean is not None
        for name in ("_limits", "_clip_rate"):
            buffer = torch.zeros(2, dtype=torch.float64, device=self.running_mean.device)
            self.register_buffer(name, buffer, persistent=False)
        self._given = (r_max, d_max)
        self.r_max, self.d_max = r_max, d_max

    def settings(self) -> dict[str, Any]:
        """What :meth:`adopt` needs to make a layer like this one."""
        return {**super().settings(), "r_max": self.r_max, "d_max": self.d_max}

    def _leave(self) -> None:
        self._drop_buffers("_limits", "_clip_rate")
        del self._given

    @property
    def r_max(self) -> float:
        """Largest correction of the scale."""
        return self._given[0] if self._limits.is_meta else float(self._limits[0])

    @r_max.setter
    def r_max(self, value: float) -> None:
        if not value >= 1:
            raise ValueError(f"r_max must be at least 1 (1 is no correction), got {value}.")
        self._limits[0] = value
        self._given = (float(value), self._given[1])

    @property
    def d_max(self) -> float:
        """Largest correction of the mean, in standard deviations."""
        return self._given[1] if self._limits.is_meta else float(self._limits[1])

    @d_max.setter
    def d_max(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"d_max must be at least 0 (0 is no correction), got {value}.")
        self._limits[1] = value
        self._given = (self._given[0], float(value))

    @property
    def clip_rate(self) -> tuple[float, float]:
        """Shares of channels whose r and d the last training batch had clipped."""
        r, d = self._clip_rate.tolist()
        return r, d

    def reset_running_stats(self) -> None:
        """As torch's; the limits are those that were set."""
        super().reset_running_stats()
        if "_limits" in self._buffers:  # not yet within the constructor
            self._begin("_limits", self._limits)
            self._begin("_clip_rate", self._clip_rate)

    def _begin(self, name: str, buffer: Tensor) -> None:
        buffer.copy_(buffer.new_tensor(self._given)) if name == "_limits" else super()._begin(name, buffer)

    def _normalize(self, input: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            raise SyncNormError(
                "batch renormalisation corrects towards running statistics, and they have been removed."
            )
        return batch_renorm(
            input,
            self.running_mean,
            self.running_var,
            self._limits,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked,
            track=self.track_running_stats,
            group=self._group() if self.training else LOCAL,
            backend=self.backend,
            clip_rate=self._clip_rate,
            input_dims=self.input_dims,
            site=None if torch.compiler.is_compiling() else self,
        )

    def extra_repr(self) -> str:
        """The fields of the base, and the limits."""
        return f"{super().extra_repr()}, r_max={self.r_max:g}, d_max={self.d_max:g}"


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    __doc__ = _BatchRenorm.__doc__
    reverts_to = nn.BatchNorm1d
    input_dims = (2, 3)


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    __doc__ = _BatchRenorm.__doc__
    reverts_to = nn.BatchNorm2d
    input_dims = (4,)


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    __doc__ = _BatchRenorm.__doc__
    reverts_to = nn.BatchNorm3d
    input_dims = (5,)
