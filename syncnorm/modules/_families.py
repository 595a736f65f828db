"""Which layer of each family stands for which of torch's, for those families that know their number of dims."""

from torch import nn

from syncnorm.modules._batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from syncnorm.modules._frozen_batch_norm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from syncnorm.modules._ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from syncnorm.modules._moving_average_batch_norm import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from syncnorm.modules._statistics import SyncStatistics

__all__ = ["FAMILIES"]

_PLAIN: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS: tuple[tuple[type[SyncStatistics], ...], ...] = (
    (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
    (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d),
    (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d),
    (MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d),
)

FAMILIES: dict[str, dict[type[nn.Module], type[SyncStatistics]]] = {
    layers[0].family: dict(zip(_PLAIN, layers, strict=True)) for layers in _LAYERS
}
"""By name of the family and by torch's class; ``"sync_batch_norm"`` is :data:`TARGETS`, which adapters extend."""
