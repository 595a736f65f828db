"""Doors for Lightning: a callback, a plugin, and data and a model to try them on. Importing this imports Lightning."""

from syncnorm.lightning._adaptive_gradient_clipping import AdaptiveGradientClipping
from syncnorm.lightning._norm_monitor import NormMonitor
from syncnorm.lightning._precise_batch_norm import PreciseBatchNorm
from syncnorm.lightning._renorm_schedule import RenormSchedule
from syncnorm.lightning._sync_norm import SyncNorm
from syncnorm.lightning._sync_norm_plugin import SyncNormPlugin
from syncnorm.lightning.digits import DigitsDataModule, DigitsMLP

__all__ = [
    "AdaptiveGradientClipping",
    "DigitsDataModule",
    "DigitsMLP",
    "NormMonitor",
    "PreciseBatchNorm",
    "RenormSchedule",
    "SyncNorm",
    "SyncNormPlugin",
]
