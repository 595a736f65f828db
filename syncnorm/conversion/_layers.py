"""What there is in a model: every layer that keeps batch statistics, with all names and all parents that it has.

``named_children`` and ``named_modules`` show a shared module once. Here every alias counts, since a replacement has
to take the place in each of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = [
    "ORIGIN",
    "SHARDED",
    "Layer",
    "Origin",
    "class_names",
    "display",
    "find_layers",
    "keeps_batch_statistics",
    "origin_of",
    "qualified_type",
    "walk",
]

# What FSDP, the first and the second, leaves in the class of a module that it shards.
SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
ORIGIN = "_syncnorm_origin"
# What wrappers put into a qualified name. Patterns see names with and without.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "_FabricModule"}


@dataclass(frozen=True)
class Origin:
    """What a replaced layer keeps of the one before it: not a submodule, so that no key, hook or optimizer sees it.

    Attributes:
        module: The original object.
        to: What it was converted to.
        made: The call that made the layer in its place, in words.
        dtype: Of its weight then; of its statistics where it had none.
        around: Of what was around it then.
        fields: Attributes and tensors of the layer in its place as its constructor left it: what else it has is its user's.
    """

    module: nn.Module
    to: str
    made: str
    dtype: torch.dtype | None = None
    around: torch.dtype | None = None
    fields: frozenset[str] = frozenset()


class Place(NamedTuple):
    """One position of a module in the tree: ``parent._modules[key]``; no parent for the root."""

    name: str
    short_name: str
    module: nn.Module
    parent: nn.Module | None
    key: str
    metric: str | None


@dataclass
class Layer:
    """A normalisation layer with everything that holds it.

    Attributes:
        module: The layer.
        names: Qualified names, the first one first.
        short_names: The same without what DDP, FSDP and torch.compile put in.
        places: ``(parent, key)`` pairs; empty for a root.
        metric: The torchmetrics metric around it, if every name is inside one.
    """

    module: nn.Module
    names: list[str] = field(default_factory=list)
    short_names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    metric: str | None = None

    @property
    def subject(self) -> nn.Module:
        """The layer as its author wrote it: the original where this one is a replacement."""
        origin = origin_of(self.module)
        return self.module if origin is None else origin.module


def find_layers(model: nn.Module, wanted: Callable[[nn.Module], bool] | None = None) -> list[Layer]:
    """Layers of ``model`` in order of their first name: those ``wanted``, by default batch norms and what took their place."""
    layers: dict[int, Layer] = {}
    for place in walk(model):
        if not (_is_or_was_batch_norm if wanted is None else wanted)(place.module):
            continue
        layer = layers.setdefault(id(place.module), Layer(place.module, metric=place.metric))
        layer.names.append(place.name)
        layer.short_names.append(place.short_name)
        layer.metric = layer.metric and place.metric
        if place.parent is not None and (place.parent, place.key) not in layer.places:
            layer.places.append((place.parent, place.key))
    return list(layers.values())


def walk(model: nn.Module) -> Iterator[Place]:
    """Every position of every module below and including ``model``, aliases too."""
    return _walk(Place("", "", model, None, "", None), ())


def _walk(place: Place, path: tuple[int, ...]) -> Iterator[Place]:
    yield place
    path = (*path, id(place.module))
    metric = place.metric
    if metric is None and any(
        name.startswith("torchmetrics.") and name.endswith(".Metric") for name in _mro(place.module)
    ):
        metric = display(place.name)
    for key, child in place.module._modules.items():
        if child is None or id(child) in path:
            continue
        wrapper = key in _WRAPPED or (key in ("module", "_forward_module") and class_names(place.module) & _WRAPPERS)
        short = place.short_name if wrapper else _join(place.short_name, key)
        yield from _walk(Place(_join(place.name, key), short, child, place.module, key, metric), path)


def keeps_batch_statistics(module: nn.Module) -> bool:
    """Whether ``module`` normalises by statistics of the batch: torch's batch norms, theirs and ours, and look-alikes.

    A look-alike keeps ``running_mean`` and ``running_var`` of its own without being torch's; frozen ones do not move
    and are left out.
    """
    if isinstance(module, _BatchNorm | _LazyNormBase):
        return not class_names(module) & {"LazyInstanceNorm1d", "LazyInstanceNorm2d", "LazyInstanceNorm3d"}
    if isinstance(module, _InstanceNorm):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in str(getattr(module, "original_name", ""))
    own = module._buffers
    return "running_mean" in own and "running_var" in own and "Frozen" not in type(module).__name__


def _is_or_was_batch_norm(module: nn.Module) -> bool:
    return keeps_batch_statistics(module) or origin_of(module) is not None


def origin_of(module: nn.Module) -> Origin | None:
    """What ``module`` took the place of; None if it is nobody's replacement."""
    origin = module.__dict__.get(ORIGIN)
    return origin if isinstance(origin, Origin) else None


def set_origin(module: nn.Module, origin: Origin) -> None:
    """Remember ``origin`` in a place that torch does not look into for submodules."""
    module.__dict__[ORIGIN] = origin


def class_names(module: nn.Module) -> set[str]:
    """Names of the classes that ``module`` is an instance of."""
    return {cls.__name__ for cls in type(module).__mro__}


def qualified_type(cls: type) -> str:
    """``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def display(name: str) -> str:
    """A qualified name for people: the root has none."""
    return name or "(the model itself)"


def _mro(module: nn.Module) -> Iterator[str]:
    return (qualified_type(cls) for cls in type(module).__mro__)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
