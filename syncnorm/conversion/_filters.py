"""The convolutions before a norm, whose filters are normalised too: the same objects with another class, and back."""

from typing import Any

import torch
from torch import nn

from syncnorm.conversion._layers import Layer, find_layers
from syncnorm.conversion._targets import FILTERS
from syncnorm.conversion._verdict import Verdict, own_forward
from syncnorm.modules._sharded import sharded_like

__all__ = ["convolutions", "has_swapped_filters", "judge_convolution", "plain_filters", "swap_filters"]

_BEFORE = "_syncnorm_convolution"


def convolutions(model: nn.Module, given: dict[str, Any]) -> list[Layer]:
    """Every convolution of ``model``, where an option asks for filters to be normalised."""
    if not any(given.get(name) for name in FILTERS):
        return []
    return find_layers(model, lambda module: isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d))


def judge_convolution(layer: Layer, given: dict[str, Any]) -> Verdict:
    """Decide about one selected convolution."""
    module, own = layer.module, type(layer.module).__name__
    option = next(name for name in FILTERS if given.get(name))
    if type(module) in FILTERS[option].values():
        return Verdict("keep", own, f"there already, {option}")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return Verdict("skip", own, "lazy, its filters are not known yet; run one forward pass, then convert")
    target = FILTERS[option].get(type(module))
    if target is None:
        return Verdict(
            "skip",
            own,
            f"{own} may do more than convolve; syncnorm.modules.{option}(layer) does it, or exclude the layer",
        )
    if own_forward(module):
        return Verdict("skip", own, own_forward(module))
    weight = module._parameters.get("weight")
    if isinstance(weight, torch.Tensor) and weight.shape[1:].numel() < 2:
        return Verdict("skip", own, "filters of one value each, which would become 0; exclude it")
    return Verdict("swap", target.__name__, f"{option}, the same parameters and keys")


def swap_filters(module: nn.Module, given: dict[str, Any]) -> None:
    """Make ``module`` a convolution by normalised filters, in place."""
    option = next(name for name in FILTERS if given.get(name))
    plain, target = type(module), FILTERS[option][type(module)]
    fields = vars(target(2, 1, 1, device="meta"))
    added = {name: value for name, value in fields.items() if name not in vars(plain(2, 1, 1, device="meta"))}
    module.__dict__.update(added)
    module.__dict__[_BEFORE] = (plain, tuple(added))
    module.__class__ = target


def plain_filters(module: nn.Module) -> None:
    """Undo :func:`swap_filters`; nothing for a module that it has not seen."""
    if has_swapped_filters(module):
        plain, added = module.__dict__.pop(_BEFORE)
        for name in added:
            module.__dict__.pop(name, None)
        module.__class__ = sharded_like(plain, type(module))


def has_swapped_filters(module: nn.Module) -> bool:
    """Whether :func:`swap_filters` was here."""
    return _BEFORE in module.__dict__
