"""A checkpoint is translated without its model: what its entries tell is enough to convert a stand-in for each norm.

Entries tell that a layer keeps batch statistics, and how many channels it has; they tell neither eps, momentum, groups nor
dims. Group, layer and instance norms are the same there, a weight and a bias, so they have to be named.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from syncnorm.conversion._convert import convert
from syncnorm.conversion._layers import display
from syncnorm.conversion._plan import plan
from syncnorm.conversion._replace import STATISTICS
from syncnorm.conversion._targets import STATISTICS_FAMILIES
from syncnorm.conversion._validate import validate_state_dict

__all__ = ["ConvertedLayer", "NoNormsError", "convert_state_dict"]

_AFFINE = ("weight", "bias")


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of the entries of one norm.

    Attributes:
        name: Its qualified name in the state dict; empty for the state dict of a single layer.
        channels: C.
        kept: Entries that stay as they are.
        new: Entries that were made, with the values of a new layer.
        dropped: Entries that have no use any more.
    """

    name: str
    channels: int
    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


class NoNormsError(ValueError):
    """There is no norm to translate."""


def convert_state_dict(
    state_dict: Mapping[str, Any], to: str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[dict[str, Any], tuple[ConvertedLayer, ...]]:
    """Translate the entries of batch norms into those of another norm, or those of another norm into a batch norm's.

    A batch norm is what has a running mean and a running variance ``[C]``, and beside them nothing but a weight, a bias and a
    counter. An instance norm that tracks statistics looks the same: exclude it. Weight and bias are carried over where the
    new norm has them, other parameters of it begin as in a new layer, statistics that it does not use are dropped. A layer
    without statistics gets those of a new batch norm, mean 0 and variance 1: recalibrate before evaluating.

    Args:
        state_dict: Of a whole model. It is not changed; tensors of the result are the same ones.
        to: ``"batch_norm"``, which is torch's, or a target of :func:`syncnorm.convert`. The statistics family (torch's
            SyncBatchNorm, ours, batch renorm, ...) has batch norm's entries.
        include: Globs on qualified names; only these layers. Norms without statistics are made batch norms if named here, and
            left by every other target.
        exclude: Globs; these layers are left. Stronger than ``include``.

    Returns:
        The new state dict, in the order of the old one, and what became of each layer that was selected.

    Raises:
        ValueError: If there is no norm to translate, a pattern matches none, an entry cannot be right
            (:func:`syncnorm.validate_state_dict`), or ``to`` is unknown.

    Example:
        >>> state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
        >>> list(convert_state_dict(state, "group_norm")[0])
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    family = to == "batch_norm" or to in STATISTICS_FAMILIES
    found = _norms(state_dict)
    chosen = {n: entries for n, entries in found.items() if _tracks(entries) or (family and _any(n, include))}
    _refuse_nothing(found, chosen)
    stand_in = _assemble({name: _layer(entries) for name, entries in chosen.items()})
    validate_state_dict(stand_in, state_dict)
    for name, entries in chosen.items():
        layer = _at(stand_in, name)
        layer._buffers.update({entry: tensor for entry, tensor in entries.items() if entry in STATISTICS})
        affine = {
            entry: nn.Parameter(tensor, requires_grad=False) for entry, tensor in entries.items() if entry in _AFFINE
        }
        layer._parameters.update(affine)
    selection: dict[str, Any] = {"include": list(include) or None, "exclude": list(exclude) or None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups and activations, which are the model's, not the checkpoint's
        made = plan(stand_in, "sync_batch_norm" if family else to, **selection)
        names = [entry.name for entry in made.entries if entry.action in ("swap", "replace")]
        if not names:
            raise ValueError(f"exclude={list(exclude)} leaves no norm to translate; there are {display_names(chosen)}.")
        converted = stand_in if family else convert(stand_in, to, **selection)
    layers, states = [], {}
    for name in names:
        module, old = _at(converted, name), chosen[name]
        state: Any = module.state_dict()
        if family and _tracks(old):
            state = {entry: state[entry] for entry in old}  # as it is: torch before 0.4.1 had no counter
        states[name] = state
        kept = tuple(entry for entry in old if entry in state)
        new = tuple(entry for entry in state if entry not in old)
        dropped = tuple(entry for entry in old if entry not in state)
        channels = next(iter(old.values())).numel()
        layers.append(ConvertedLayer(name, channels, kept, new, dropped))
    return _merge(state_dict, states), tuple(layers)


def display_names(names: Iterable[str], at_most: int = 4) -> str:
    """The first few of some names, and how many there are more."""
    shown = [display(name) for name in names]
    more = f" and {len(shown) - at_most} more" if len(shown) > at_most else ""
    return f"{shown[:at_most]}{more}"


def _norms(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Entries by layer, of what may be a batch norm, or another norm with a weight."""
    entries: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in state_dict.items():
        prefix, _, entry = str(key).rpartition(".")
        entries[prefix][entry] = value
    return {name: own for name, own in entries.items() if _may_be_norm(own)}


def _may_be_norm(entries: dict[str, Any]) -> bool:
    first = entries.get("running_mean", entries.get("weight"))
    complete = ("running_mean" in entries) == ("running_var" in entries)
    allowed = {*_AFFINE, *STATISTICS} if "running_mean" in entries else {*_AFFINE}
    return complete and {*entries} <= allowed and isinstance(first, Tensor) and first.dim() == 1


def _tracks(entries: Mapping[str, Any]) -> bool:
    return "running_mean" in entries


def _any(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _refuse_nothing(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    if chosen:
        return
    text = "no entry is a batch norm's, which would be a running_mean and a running_var of one value per channel."
    if found:
        text += (
            " Group, layer and instance norms cannot be told apart here, all are a weight and a bias: to='batch_norm' makes "
            f"batch norms of those that include names, out of {display_names(found)}."
        )
    raise NoNormsError(text)


def _layer(entries: Mapping[str, Tensor]) -> nn.Module:
    like = entries["running_mean"] if _tracks(entries) else entries["weight"]
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32  # statistics in half hardly move
    layer = nn.BatchNorm1d(like.numel(), dtype=wide)
    for name in _AFFINE:
        if name not in entries:
            layer.register_parameter(name, None)
    return layer


def _assemble(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model that has these layers under these names."""
    if "" in layers and len(layers) > 1:
        raise ValueError(
            "the state dict is that of a single batch norm and of a model with several: give one of the two."
        )
    root = layers.get("", nn.Module())
    for name, layer in layers.items():
        parent, (*path, last) = root, name.split(".")
        for step in path:
            parent = parent._modules.setdefault(step, nn.Module())  # type: ignore[assignment]
        if name:
            layer._modules.update(parent._modules.get(last, nn.Module())._modules)  # type: ignore[union-attr]
            parent._modules[last] = layer  # not add_module, which refuses names that this stand-in alone has
    return root


def _at(root: nn.Module, name: str) -> nn.Module:
    module = root
    for step in name.split(".") if name else ():
        module = cast(nn.Module, module._modules[step])  # not get_submodule, to which a step "forward" is a method
    return module


def _merge(state_dict: Mapping[str, Any], states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The old entries in their order, with the new ones of each layer where its first one was."""
    merged: Any = type(state_dict)() if isinstance(state_dict, dict) else {}
    written: set[str] = set()
    for key, value in state_dict.items():
        name = str(key).rpartition(".")[0]
        if name not in states:
            merged[key] = value
        elif name not in written:
            written.add(name)
            merged.update({f"{name}.{entry}" if name else entry: tensor for entry, tensor in states[name].items()})
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        versions = {name: getattr(state, "_metadata", {}).get("") for name, state in states.items()}
        merged._metadata = {**metadata, **{name: version for name, version in versions.items() if version}}
    return merged  # type: ignore[no-any-return]
