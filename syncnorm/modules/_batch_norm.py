"""torch's batch norm for inputs of any rank: what a layer that never knew its number of dims goes back to."""

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchNorm"]


class BatchNorm(_BatchNorm):
    """``nn.BatchNorm1d/2d/3d`` in one: the same arithmetic and state, for inputs ``[N, C, *]`` of any rank.

    ``nn.SyncBatchNorm`` does not say which of the three it came from; :func:`syncnorm.revert` gives it this class unless
    it is told the number of dims.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm expects an input [N, C, *] of at least 2 dims, got {list(input.shape)}.")
