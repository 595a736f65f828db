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
        SyncNormError: If a layer was replaced and FSDP has sharded the model since; if a layer was parametrized since, or
            its ``forward`` replaced on the object, as hooks of accelerate do; or if what took a layer's place was given
            tensors or modules of its own. Nothing has changed then.

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
    _refuse(model)
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


def _refuse(model: nn.Module) -> None:
    """Raise where a layer that would change holds something that works on it as it is now."""
    why: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SyncStatistics) or origin_of(module) is not None or has_swapped_filters(module):
            why.setdefault(_hindrance(module), []).append(display(name))
    why.pop("", None)
    if why:
        reason, names = next(iter(why.items()))
        raise SyncNormError(
            f"revert changes the class of {shorten(names)}, and {reason}. Undo that first; nothing was changed."
        )


def _hindrance(module: nn.Module) -> str:
    if own_forward(module):
        return (
            "forward was replaced on the object (by a hook of another library?), which may call the layer as it is now"
        )
    if "parametrizations" in module._modules:
        return "it is parametrized (torch.nn.utils.parametrize.remove_parametrizations)"
    origin, tensors = origin_of(module), {*module._parameters, *module._buffers, *module._modules}
    if origin is not None and origin.fields and not tensors <= origin.fields:
        return f"it holds {sorted(tensors - origin.fields)}, which what it took the place of has not (pruning, weight norm?)"
    return ""


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
