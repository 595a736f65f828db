"""timm's batch norm with dropout and activation inside, over all ranks: the norm is ours, what follows it is timm's."""

import importlib
from typing import Any

from torch import Tensor, nn

from syncnorm.modules import SyncStatistics

__all__ = ["sync_batch_norm_act"]

_NAME = "SyncBatchNormAct2d"


def sync_batch_norm_act(source: type[nn.Module]) -> type[SyncStatistics]:
    """The class that takes the place of timm's ``BatchNormAct2d``, which is ``source``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(SyncStatistics.forward(self, x)))
        return y

    fields = {
        "__doc__": "timm's BatchNormAct2d with the statistics of all ranks.",
        "__module__": __name__,
        "forward": forward,
        "input_dims": (4,),
        "reverts_to": source,
    }
    target: type[SyncStatistics] = type(_NAME, (SyncStatistics, source), fields)
    globals()[_NAME] = target
    return target


def __getattr__(name: str) -> Any:
    # A pickled layer asks for its class by name, perhaps in a process that has not converted anything yet.
    if name == _NAME:
        return sync_batch_norm_act(importlib.import_module("timm.layers.norm_act").BatchNormAct2d)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
