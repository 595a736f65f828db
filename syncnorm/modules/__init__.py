"""Layers: the functions of :mod:`syncnorm.functional` with their state."""

from syncnorm.modules._adaptive_instance_norm import AdaptiveInstanceNorm
from syncnorm.modules._batch_instance_norm import BatchInstanceNorm1d, BatchInstanceNorm2d, BatchInstanceNorm3d
from syncnorm.modules._batch_norm import BatchNorm
from syncnorm.modules._batch_norm_lstm import BatchNormLSTM
from syncnorm.modules._batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from syncnorm.modules._conditional_norm import ConditionalNorm
from syncnorm.modules._dynamic_tanh import DynamicTanh
from syncnorm.modules._evo_norm import EvoNormS0
from syncnorm.modules._evo_norm_b0 import EvoNormB0
from syncnorm.modules._families import FAMILIES
from syncnorm.modules._filter_response_norm import TLU, FilterResponseNorm
from syncnorm.modules._frozen_batch_norm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from syncnorm.modules._ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from syncnorm.modules._group_norm import GroupNorm
from syncnorm.modules._instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from syncnorm.modules._layer_norm import LayerNorm
from syncnorm.modules._layer_norm_lstm import LayerNormLSTM
from syncnorm.modules._min_max_scale import MinMaxScale
from syncnorm.modules._moving_average_batch_norm import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from syncnorm.modules._rms_norm import RMSNorm
from syncnorm.modules._running_norm import RunningNorm
from syncnorm.modules._spectral_norm import spectral_norm
from syncnorm.modules._standardize import Standardize
from syncnorm.modules._statistics import SyncStatistics, is_synced
from syncnorm.modules._swap import TARGETS, register_swap
from syncnorm.modules._switchable_norm import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from syncnorm.modules._sync_batch_norm import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from syncnorm.modules._weight_centralization import (
    WeightCentralizedConv1d,
    WeightCentralizedConv2d,
    WeightCentralizedConv3d,
    weight_centralization,
)
from syncnorm.modules._weight_standardization import (
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
    weight_standardization,
)

__all__ = [
    "AdaptiveInstanceNorm",
    "BatchInstanceNorm1d",
    "BatchInstanceNorm2d",
    "BatchInstanceNorm3d",
    "BatchNorm",
    "BatchNormLSTM",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConditionalNorm",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNormLSTM",
    "MinMaxScale",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "RMSNorm",
    "RunningNorm",
    "Standardize",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncStatistics",
    "FAMILIES",
    "TARGETS",
    "TLU",
    "WeightCentralizedConv1d",
    "WeightCentralizedConv2d",
    "WeightCentralizedConv3d",
    "WeightStandardizedConv1d",
    "WeightStandardizedConv2d",
    "WeightStandardizedConv3d",
    "is_synced",
    "register_swap",
    "spectral_norm",
    "weight_centralization",
    "weight_standardization",
]
