"""syncnorm: normalisation layers that mean the same thing on one device and on a thousand.

Importing it brings torch and nothing heavier; the Lightning doors load Lightning when they are first asked for.
"""

import importlib
from typing import Any

from syncnorm._version import __version__
from syncnorm.distributed import loss_weight
from syncnorm.errors import SyncNormError, SyncNormMismatch
from syncnorm.modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__all__ = [
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncNormError",
    "SyncNormMismatch",
    "__version__",
    "loss_weight",
]
