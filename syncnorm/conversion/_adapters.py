"""Who takes the place of which exact type, and how others teach it their own layers.

An adapter may name its source by a string: then nobody imports a library because we know of it.
"""

from collections.abc import Callable
from typing import TypeAlias, cast

from torch import nn

from syncnorm.conversion._layers import qualified_type
from syncnorm.conversion._timm import sync_batch_norm_act
from syncnorm.modules import FAMILIES, TARGETS, SyncBatchNorm, SyncStatistics, register_swap
from syncnorm.modules._sharded import is_sharded, sharded_like

__all__ = ["LEFTOVERS", "register_adapter", "target_of"]

_Target: TypeAlias = type[SyncStatistics] | Callable[[type[nn.Module]], type[SyncStatistics]]

# What Trainer(sync_batchnorm=True) leaves behind: plain batch norm for any number of dims.
LEFTOVERS = tuple(
    f"{package}.plugins.layer_sync._BatchNormXd" for package in ("lightning.pytorch", "pytorch_lightning")
)

_NAMED: dict[str, _Target] = {}


def register_adapter(source: type[nn.Module] | str, target: _Target) -> None:
    """Teach :func:`syncnorm.convert` a batch norm that has a ``forward`` of its own.

    Args:
        source: The exact class, or its dotted name (``"package.module.Class"``, as ``cls.__module__`` has it), which is
            looked up only when a model contains it; nothing is imported.
        target: A subclass of both :class:`syncnorm.modules.SyncStatistics` (first) and ``source``, whose ``forward``
            does what that of ``source`` does. For a dotted name also a function that is given the source class and
            returns such a subclass.

    Raises:
        TypeError: If ``target`` cannot take the place of ``source``. For a dotted name this is seen at conversion.

    Example:
        >>> class BatchNormReLU(torch.nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> class SyncBatchNormReLU(syncnorm.modules.SyncStatistics, BatchNormReLU):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()  # SyncStatistics.forward: the norm alone
        >>> syncnorm.register_adapter(BatchNormReLU, SyncBatchNormReLU)
    """
    if isinstance(source, str):
        if "." not in source:
            raise ValueError(f'a source given by name must be dotted, "package.module.Class"; got {source!r}.')
        _NAMED[source] = target
    elif isinstance(source, type) and isinstance(target, type):
        _register(source, target)
    else:
        raise TypeError(
            "register_adapter takes a class and the class that takes its place, or a dotted name and a class or "
            f"function; got {source!r} and {target!r}."
        )


def target_of(source: type[nn.Module]) -> type[SyncStatistics] | None:
    """The class that exactly ``source`` is swapped to; None if nobody registered one."""
    if source not in TARGETS:
        name = qualified_type(source)
        if name in LEFTOVERS:
            TARGETS[source] = SyncBatchNorm
        elif name in _NAMED:
            target = _NAMED[name]
            _register(source, target if isinstance(target, type) else target(source))
        elif is_sharded(source):
            plain = target_of(source.__bases__[1])
            if plain is not None:
                TARGETS[source] = cast(type[SyncStatistics], sharded_like(plain, source))
    return TARGETS.get(source)


def target_in_family(source: type[nn.Module], to: str) -> type[SyncStatistics] | None:
    """The class of family ``to`` that exactly ``source``, torch's or of another family, is swapped to; None if none is."""
    plain = source.reverts_to if issubclass(source, SyncStatistics) and source.family != to else source
    return target_of(plain) if to == "sync_batch_norm" else FAMILIES[to].get(plain)


def _register(source: type[nn.Module], target: type[SyncStatistics]) -> None:
    register_swap(source, target)
    if not hasattr(target, "reverts_to"):
        target.reverts_to = source


for _package in ("timm.layers", "timm.models.layers"):
    register_adapter(f"{_package}.norm_act.BatchNormAct2d", sync_batch_norm_act)
