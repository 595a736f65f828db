"""syncnorm: normalisation layers that mean the same thing on one device and on a thousand.

Importing it brings torch and nothing heavier; the Lightning doors load Lightning when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from syncnorm._version import __version__
from syncnorm.calibration import TentAdapter, adapt_batch_norm, recalibrate, reduce_buffers
from syncnorm.conversion import (
    convert,
    disabled,
    join,
    no_stats_update,
    plan,
    register_adapter,
    revert,
    validate_state_dict,
)
from syncnorm.diagnostics import audit, explain, inspect, list_norms
from syncnorm.distributed import loss_weight, set_check, set_exchange, set_watch
from syncnorm.errors import (
    SyncNormError,
    SyncNormMismatch,
    SyncNormNonFinite,
    SyncNormPeerLost,
    SyncNormTimeout,
)
from syncnorm.modules import (
    BatchNormLSTM,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    DynamicTanh,
    FilterResponseNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNormLSTM,
    MinMaxScale,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
    RMSNorm,
    RunningNorm,
    Standardize,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    WeightStandardizedConv2d,
    spectral_norm,
)

if TYPE_CHECKING:
    from syncnorm.diagnostics import advise as advise
    from syncnorm.diagnostics import verify as verify
    from syncnorm.lightning import NormMonitor as NormMonitor
    from syncnorm.lightning import PreciseBatchNorm as PreciseBatchNorm
    from syncnorm.lightning import RenormSchedule as RenormSchedule
    from syncnorm.lightning import SyncNorm as SyncNorm
    from syncnorm.lightning import SyncNormPlugin as SyncNormPlugin

__all__ = [
    "BatchNormLSTM",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "DynamicTanh",
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
    "NormMonitor",
    "PreciseBatchNorm",
    "RMSNorm",
    "RunningNorm",
    "Standardize",
    "RenormSchedule",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncNorm",
    "SyncNormError",
    "SyncNormMismatch",
    "SyncNormNonFinite",
    "SyncNormPeerLost",
    "SyncNormPlugin",
    "SyncNormTimeout",
    "TentAdapter",
    "WeightStandardizedConv2d",
    "__version__",
    "adapt_batch_norm",
    "advise",
    "audit",
    "convert",
    "disabled",
    "explain",
    "inspect",
    "join",
    "list_norms",
    "loss_weight",
    "no_stats_update",
    "plan",
    "recalibrate",
    "reduce_buffers",
    "register_adapter",
    "revert",
    "set_check",
    "set_exchange",
    "set_watch",
    "spectral_norm",
    "validate_state_dict",
    "verify",
]

_LAZY = {
    "NormMonitor": "syncnorm.lightning",
    "PreciseBatchNorm": "syncnorm.lightning",
    "RenormSchedule": "syncnorm.lightning",
    "SyncNorm": "syncnorm.lightning",
    "SyncNormPlugin": "syncnorm.lightning",
    "advise": "syncnorm.diagnostics",
    "verify": "syncnorm.diagnostics",  # starts processes, which brings multiprocessing
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
