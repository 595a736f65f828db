"""Lightning under both of its names, and base classes that both accept.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code twice, and each refuses the other's plugins and, in
its CLI, the other's callbacks. A class with both bases is welcome in both; the second import costs about 0.1 s.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "Callback",
    "LayerSync",
    "LightningDataModule",
    "LightningModule",
    "flavour",
    "is_kind_of",
    "rank_zero_info",
    "rank_zero_warn",
]


def _installed() -> list[ModuleType]:
    names = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]
    if not names:
        raise ImportError(
            "this part of syncnorm needs Lightning, and neither lightning nor pytorch-lightning is installed: "
            "pip install lightning. Without it there is syncnorm.convert(model)."
        )
    return [import_module(name) for name in names]


_FLAVOURS = _installed()


def _bases(path: str, name: str) -> tuple[Any, ...]:
    return tuple(getattr(import_module(f"{flavour.__name__}.{path}"), name) for flavour in _FLAVOURS)


if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.plugins import LayerSync
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
else:

    class Callback(*_bases("callbacks", "Callback")):
        """A callback of every Lightning that is installed."""

    class LayerSync(*_bases("plugins", "LayerSync")):
        """A layer-sync plugin of every Lightning that is installed."""

    LightningModule, LightningDataModule = _FLAVOURS[0].LightningModule, _FLAVOURS[0].LightningDataModule
    _utilities = import_module(f"{_FLAVOURS[0].__name__}.utilities")
    rank_zero_info, rank_zero_warn = _utilities.rank_zero_info, _utilities.rank_zero_warn


def flavour() -> str:
    """The package whose Trainer our own modules and CLI belong to: ``lightning.pytorch`` where both are installed."""
    return _FLAVOURS[0].__name__


def is_kind_of(thing: object, name: str) -> bool:
    """Whether ``thing`` is an instance of Lightning's class ``name``, whichever Lightning it came from."""
    prefixes = ("lightning.", "pytorch_lightning.")
    return any(cls.__name__ == name and cls.__module__.startswith(prefixes) for cls in type(thing).__mro__)
