"""Base of the layers in which batch statistics are one part among others.

They are no batch norms, and no class swap leads to them or back.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncnorm.distributed.groups import LOCAL, Group
from syncnorm.functional._sync_batch_norm import tell_others
from syncnorm.modules._over_ranks import OverRanks

__all__ = ["MixedStatistics"]


class MixedStatistics(OverRanks):
    """Parameters, running statistics and group of a layer that uses the batch of all ranks among other things.

    Args:
        num_features: C.
        eps: Added to variances; positive.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation.
        process_group: Which ranks share statistics, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers. Running statistics stay as wide as they are under ``.half()`` and ``.bfloat16()``.
        bias: With ``affine``, whether to learn the bias too.
    """

    too_narrow = (torch.float16, torch.bfloat16)
    input_dims: ClassVar[tuple[int, ...] | None] = None

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        process_group: object,
        device: Any,
        dtype: torch.dtype | None,
        *,
        bias: bool,
    ) -> None:
        super().__init__(process_group)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}.")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(ones.clone()) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(ones)) if affine and bias else None)
        wide = torch.promote_types(ones.dtype, torch.float32)
        self.register_buffer("running_mean", torch.zeros_like(ones, dtype=wide) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones_like(ones, dtype=wide) if track_running_stats else None)
        counter = torch.zeros((), dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        for buffer, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if buffer is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """Forget what was learned, and all batches."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [N, C, *]: with the batch of all ranks when training, with running statistics otherwise."""
        return self._named(self._normalize, input)

    def _normalize(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _tell_others(self, input: Tensor) -> None:
        """Send a refusal to the ranks that would wait for this one in a forward with ``input``."""
        if self.training:
            tell_others(input, self._group(), self.num_features, self)

    def _statistics(self) -> dict[str, Any]:
        """What every function of this kind is told about running statistics and ranks."""
        group: Group = self._group() if self.training else LOCAL
        return {
            "num_batches_tracked": self.num_batches_tracked,
            "track": self.track_running_stats,
            "group": group,
            "num_features": self.num_features,
            "input_dims": self.input_dims,
            "site": None if torch.compiler.is_compiling() else self,
        }

    def extra_repr(self) -> str:
        """The fields that torch's batch norm shows, and the group where it is not the default."""
        fields = ["eps", "momentum", "affine", "track_running_stats"]
        shown = [str(self.num_features), *(f"{name}={getattr(self, name)}" for name in fields)]
        if self.affine and self.bias is None:
            shown.append("bias=False")
        if self.process_group != "world":
            shown.append(f"process_group={self._group_spec}")
        return ", ".join(shown)
