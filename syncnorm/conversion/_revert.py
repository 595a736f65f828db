"""The way back: the exact original classes, and the original modules where another had taken their place."""

import weakref
from typing import TypeVar, cast

import torch
from torch import nn

from syncnorm.conversion._adapters import LEFTOVERS
from syncnorm.conversion._filters import has_swapped_filters, plain_filters
from syncnorm.conversion._fused_forward import unfuse
from syncnorm.conversion._layers import SHARDED, class_names, display, find_layers, origin_of, qualified_type
from syncnorm.conversion._plan import shorten
from syncnorm.conversion._replace import around, like_tensor, put, restore_origin
from syncnorm.conversion._verdict import own_forward
from syncnorm.errors import SyncNormError
from syncnorm.modules import BatchNorm, SyncStatistics

__all__ = ["revert", "without_synchronisation"]

_Model = TypeVar("_Model", bound=nn.Module)  # a model that is itself a norm may come back as another

_DIMS: dict[int | None, type[nn.Module]] = {None: BatchNorm, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

# Layers that were nn.SyncBatchNorm before convert and are again: a second revert leaves them, as the first one did.
_given_back: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def revert(model: _Model, *, dim: int | None = None) -> _Model:
    """Undo :func:`syncnorm.convert`, in place: every layer gets its exact original class, or its place, back.

    What was learned since stays: parameters are the objects in use now, running statistics are where training brought
    them (of a layer whose replacement had none, as a group norm: as they were). Training flags, hooks, device and attributes
    of your own are the current ones; so are eps and momentum, where the replacement had them from the layer.
    ``nn.SyncBatchNorm`` that was not converted by us becomes plain batch norm.

    Args:
        model: A converted model, or any other.
        dim: What a layer becomes that does not know its number of spatial dims: ``nn.BatchNorm{dim}d`` for 1, 2 or 3.
            Those layers are ``nn.SyncBatchNorm``, our ``SyncBatchNorm`` and what ``Trainer(sync_batchnorm=True)``
            leaves. None gives an ``nn.SyncBatchNorm`` that was converted back as it was, and turns others into
            :class:`syncnorm.modules.BatchNorm`, which takes any number of dims.

    Returns:
        ``model``, or the original layer if ``model`` took the place of one.

    Raises:
        ValueError: If ``dim`` is not None, 1, 2 or 3.
        SyncNormError: If a layer was replaced and FSDP has sharded the model since, or if the ``forward`` of a layer was
            replaced on the object, as hooks of accelerate do.

    Example:
        >>> model = syncnorm.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(8)), to="layer_norm")
        >>> type(syncnorm.revert(model)[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    if dim not in _DIMS or isinstance(dim, bool):
        raise ValueError(f"dim must be 1, 2, 3 or None, got {dim!r}.")
    root: nn.Module = model
    replaced = [layer for layer in find_layers(model) if origin_of(layer.module) is not None]
    if replaced and any(class_names(module) & SHARDED for module in model.modules()):
        raise SyncNormError(
            f"revert puts the original modules back in place of {shorten([layer.names[0] for layer in replaced])}, and "
            "FSDP has sharded the model as it is. Revert the unwrapped model; nothing was changed."
        )
    held = [display(name) for name, module in root.named_modules() if _changes(module) and own_forward(module)]
    if held:
        raise SyncNormError(
            f"revert changes the class of {shorten(held)}, and forward was replaced on the object (by a hook of another "
            "library?), which may call the layer as it is now. Take that off first; nothing was changed."
        )
    near = [around(layer, model, {id(each.module) for each in replaced}) for layer in replaced]
    with torch.inference_mode(False):  # what is made here may be trained
        for layer, tensor in zip(replaced, near, strict=True):
            old = restore_origin(layer.module, like_tensor(layer, model) if tensor is None else tensor)
            put(layer.places, old)
            root = old if layer.module is model else root
            _mark_given_back(old, dim)
        for module in list(root.modules()):
            plain_filters(module)
            unfuse(module)
            _revert_class(module, dim)
    return cast(_Model, root)


def without_synchronisation(model: nn.Module) -> nn.Module:
    """Every synchronised layer of ``model`` as plain batch norm, in place; replaced layers stay replaced."""
    for module in list(model.modules()):
        _revert_class(module, None)
        if type(module) is nn.SyncBatchNorm:
            _to_plain(module, None)
    return model


def _changes(module: nn.Module) -> bool:
    return isinstance(module, SyncStatistics) or origin_of(module) is not None or has_swapped_filters(module)


def _revert_class(module: nn.Module, dim: int | None) -> None:
    if isinstance(module, SyncStatistics):
        module.release()
        _mark_given_back(module, dim)
    foreign = type(module) is nn.SyncBatchNorm and (dim is not None or module not in _given_back)
    dimless = dim is not None and (type(module) is BatchNorm or qualified_type(type(module)) in LEFTOVERS)
    if foreign or dimless:
        _to_plain(module, dim)


def _mark_given_back(module: nn.Module, dim: int | None) -> None:
    if type(module) is nn.SyncBatchNorm and dim is None:
        _given_back.add(module)


def _to_plain(module: nn.Module, dim: int | None) -> None:
    module.__dict__.pop("process_group", None)
    module.__class__ = _DIMS[dim]
