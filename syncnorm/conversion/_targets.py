"""What a batch norm can become: one entry per target. Its options are read from the constructor of the layer.

An option is what the constructor takes and a batch norm does not bring along; a wrong value is one that it refuses.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from torch import nn

from syncnorm import modules
from syncnorm.modules import SyncStatistics

__all__ = ["FILTERS", "STATISTICS_FAMILIES", "TARGETS", "TARGET_OPTIONS", "Target", "To", "check_options", "default_of"]

To = Literal[
    "sync_batch_norm",
    "batch_renorm",
    "ghost_batch_norm",
    "frozen_batch_norm",
    "moving_average_batch_norm",
    "group_norm",
    "layer_norm",
    "instance_norm",
    "rms_norm",
    "filter_response_norm",
    "evo_norm_b0",
    "evo_norm_s0",
    "dynamic_tanh",
    "switchable_norm",
    "batch_instance_norm",
]

_Layers: TypeAlias = type[nn.Module] | Mapping[type[nn.Module], type[nn.Module]]

# What a batch norm brings to the constructor of the layer in its place, under either name of the affine switch.
BROUGHT = ("eps", "momentum", "affine", "elementwise_affine", "track_running_stats", "bias", "device", "dtype")
# What would change the network and not only its norms.
_FUSED = ("activation", "negative_slope", "memory_efficient")


@cache
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict([*inspect.signature(function).parameters.items()][1:])  # without self, module or the number of channels


@dataclass(frozen=True)
class Target:
    """One thing that a batch norm can become.

    Attributes:
        layers: The class; or, where it depends on the number of dims, the classes by torch's.
        fixed: Arguments that are decided here.
        defaults: Options that are given unless the user does.
        own: Arguments that a batch norm has too, but that are the method's: not carried over, and options.
        activates: The layer is an activation too, and the one behind it has to go. The user has to take it out.
        filters: Names in :data:`FILTERS`, options of the conversion.
        remark: What the plan says of every layer.
    """

    layers: _Layers
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    activates: bool = False
    filters: tuple[str, ...] = ()
    remark: str = ""

    @property
    def example(self) -> type[nn.Module]:
        """The class, or that for images."""
        return self.layers[nn.BatchNorm2d] if isinstance(self.layers, Mapping) else self.layers

    @property
    def swaps(self) -> bool:
        """Of batch norm's own family: a layer is the same object with another class."""
        return issubclass(self.example, SyncStatistics)

    @property
    def fuses(self) -> bool:
        """Whether the layer can take in an activation, or is one."""
        return self.swaps or self.activates or "activation" in self.parameters

    @property
    def switches(self) -> tuple[str, ...]:
        """Options of the conversion, which are on or off."""
        return (*self.filters, *(("fuse",) if self.fuses else ()))

    def layer_for(self, module: nn.Module) -> type[nn.Module] | None:
        """The class that takes the place of ``module``; None if it depends on dims that ``module`` does not tell."""
        if not isinstance(self.layers, Mapping):
            return self.layers
        return next((layer for source, layer in self.layers.items() if isinstance(module, source)), None)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What the constructor takes, after the number of channels; in a swap, as far as an existing layer can take it."""
        layer: Callable[..., nn.Module] = self.example
        taken = _parameters(layer)
        if issubclass(self.example, SyncStatistics):  # swaps, for the type checker
            settings = {**_parameters(self.example.adopt), **_parameters(self.example._arrive)}
            return {name: parameter for name, parameter in taken.items() if name in settings}
        return taken

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options."""
        decided = {*BROUGHT, *_FUSED, *self.fixed} - {*self.own}
        taken = [name for name in self.parameters if name not in decided]
        affine = ("affine",) if {"affine", "elementwise_affine"} & set(self.parameters) else ()
        return (*taken, *affine, *self.switches)

    @property
    def required(self) -> tuple[str, ...]:
        """Options without a default."""
        return tuple(n for n in self.options if n in self.parameters and self.parameters[n].default is inspect._empty)


def _by_dims(name: str, plain: str = "BatchNorm") -> Mapping[type[nn.Module], type[nn.Module]]:
    return {getattr(nn, f"{plain}{dims}d"): getattr(modules, f"{name}{dims}d") for dims in (1, 2, 3)}


FILTERS: dict[str, Mapping[type[nn.Module], type[nn.Module]]] = {
    "weight_standardization": _by_dims("WeightStandardizedConv", "Conv"),
    "weight_centralization": _by_dims("WeightCentralizedConv", "Conv"),
}
"""By option, the class that every convolution of the model is swapped to, besides its norms."""


TARGETS: dict[str, Target] = {
    "sync_batch_norm": Target(_by_dims("SyncBatchNorm")),
    "batch_renorm": Target(_by_dims("BatchRenorm")),
    "ghost_batch_norm": Target(_by_dims("GhostBatchNorm")),
    "frozen_batch_norm": Target(
        _by_dims("FrozenBatchNorm"), remark="statistics and affine parameters stay as they are"
    ),
    "moving_average_batch_norm": Target(
        _by_dims("MovingAverageBatchNorm"),
        filters=("weight_centralization",),
        remark="does not centre; weight_centralization=True does, and then calls for reset_running_stats()",
    ),
    "group_norm": Target(modules.GroupNorm, filters=("weight_standardization",)),
    "layer_norm": Target(modules.GroupNorm, fixed={"num_groups": 1}),
    "instance_norm": Target(_by_dims("InstanceNorm"), fixed={"track_running_stats": False}),
    "rms_norm": Target(modules.RMSNorm, fixed={"channel_dim": 1}),
    "filter_response_norm": Target(modules.FilterResponseNorm, defaults={"tlu": True}, own=("eps",), activates=True),
    "evo_norm_b0": Target(modules.EvoNormB0, own=("eps",), activates=True),
    "evo_norm_s0": Target(modules.EvoNormS0, activates=True),
    "dynamic_tanh": Target(modules.DynamicTanh, fixed={"channel_dim": 1}),
    "switchable_norm": Target(_by_dims("SwitchableNorm")),
    "batch_instance_norm": Target(_by_dims("BatchInstanceNorm")),
}

TARGET_OPTIONS: dict[str, tuple[str, ...]] = {to: target.options for to, target in TARGETS.items()}

STATISTICS_FAMILIES = tuple(to for to, target in TARGETS.items() if target.swaps)
"""Targets with batch norm's state-dict keys: a layer is the same object with another class."""


def default_of(to: str, option: str) -> Any:
    """What an option is unless it is given; for a choice that follows each layer, None."""
    target = TARGETS[to]
    if option in target.switches:
        return False
    return None if option == "affine" else target.defaults.get(option, target.parameters[option].default)


def check_options(to: str, options: dict[str, Any]) -> None:
    """See that ``to`` is a target and takes ``options``, by name and by value, before anything is changed.

    Raises:
        ValueError: For an unknown target or a value out of range.
        TypeError: For an option that the target does not take, or of the wrong type.
    """
    if not isinstance(to, str) or to not in TARGETS:
        raise ValueError(f"to must be one of {list(TARGETS)}, got {to!r}.{_close(str(to), TARGETS)}")
    target = TARGETS[to]
    for name in options:
        if name not in target.options:
            others = [other for other, taken in TARGET_OPTIONS.items() if name in taken]
            hint = f" It belongs to {_listed(others)}." if others else _close(name, target.options)
            raise TypeError(f"to={to!r} takes the options {list(target.options)}, got {name}={options[name]!r}.{hint}")
    for name in target.required:
        if name not in options:
            raise TypeError(f"to={to!r} needs {name}=n; see syncnorm.modules.{target.example.__name__}.")
    if options.get("affine") not in (None, True, False):
        raise TypeError(f"affine must be True, False or None (as each layer has it), got {options['affine']!r}.")
    for name in target.switches:
        if not isinstance(options.get(name, False), bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}.")
    _check_values(target, {name: value for name, value in options.items() if name in target.parameters})


def _check_values(target: Target, options: dict[str, Any]) -> None:
    """Their types by the annotations of the constructor, their ranges by calling it."""
    hints = get_type_hints(target.example.__init__)
    for name, value in options.items():
        kinds = set(get_args(hints[name]) or (hints[name],)) & {int, float, bool, str}
        accepted = kinds | {int} if float in kinds else kinds
        if kinds and value is not None and type(value) not in accepted:
            raise TypeError(f"{name} must be {' or '.join(sorted(k.__name__ for k in kinds))}, got {value!r}.")
    num_features = options.get("num_groups", 1)
    if num_features < 1:
        raise ValueError(f"num_groups is a number of groups, at least 1; got {num_features}.")
    if "num_groups" in target.parameters:
        options = {"num_groups": num_features, **options}
    target.example(num_features, **options)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _close(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
