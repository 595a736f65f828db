"""Another module takes the place of a batch norm, in every parent that holds it, and can give the place back.

Parameters are the same objects, so optimizers, DDP and EMA copies keep them. Hook dictionaries are the same objects
too, so a handle removes its hook wherever the hook has gone.
"""

import math
import weakref
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm.conversion._layers import ORIGIN, Layer, Origin, origin_of, set_origin
from syncnorm.conversion._targets import TARGETS, default_of
from syncnorm.distributed import group_spec
from syncnorm.modules import SyncStatistics
from syncnorm.modules._swap import HALVES, OURS

__all__ = [
    "STATISTICS",
    "Blueprint",
    "around",
    "blueprint",
    "build_replacement",
    "like_tensor",
    "put",
    "restore_origin",
]

_AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Blueprint(NamedTuple):
    """The layer that takes the place of a batch norm, before it is made.

    Attributes:
        layer: Its class.
        num_features: C.
        arguments: Of its constructor.
        target: What the conversion is to.
    """

    layer: type[nn.Module]
    num_features: int
    arguments: dict[str, Any]
    target: str

    def make(self, **where: Any) -> nn.Module:
        """The layer as its constructor leaves it, on a device and in a dtype."""
        return self.layer(self.num_features, **self.arguments, **where)

    def __str__(self) -> str:
        """The call that makes it, without what a batch norm brings along."""
        target = TARGETS[self.target]
        choices = {*target.options, *target.fixed, "elementwise_affine"} - {"process_group"}
        shown = [str(self.num_features)]
        for name, value in self.arguments.items():
            if name in choices and (name == "num_groups" or value != target.parameters[name].default):
                shown.append(f"{name}={value}")
        return f"{self.layer.__name__}({', '.join(shown)})"


def blueprint(module: nn.Module, to: str, options: Mapping[str, Any]) -> Blueprint | None:
    """What takes the place of the batch norm ``module``; None where that depends on a number of dims it does not know."""
    target = TARGETS[to]
    layer = target.layer_for(module)
    if layer is None:
        return None
    num_features = int(cast(int, module.num_features))
    affine = options.get("affine")
    affine = module._parameters.get("weight") is not None if affine is None else affine
    brought = {
        "eps": module.eps,
        "momentum": module.momentum,
        "affine": affine,
        "elementwise_affine": affine,
        "track_running_stats": module._buffers.get("running_mean") is not None,
        "process_group": _process_group(module),
    }
    given = {name: value for name, value in options.items() if value is not None and name in target.parameters}
    brought = {name: value for name, value in brought.items() if name not in target.own}
    arguments = {**brought, **target.fixed, **target.defaults, **given, "affine": affine}
    if "num_groups" in target.parameters:
        arguments["num_groups"] = math.gcd(num_features, arguments.get("num_groups", default_of(to, "num_groups")))
    arguments = {name: value for name, value in arguments.items() if name in target.parameters}
    return Blueprint(layer, num_features, arguments, to)


def build_replacement(module: nn.Module, made: Blueprint, like: Tensor | None, near: Tensor | None) -> nn.Module:
    """The layer of a blueprint with what ``module`` has: parameters, statistics, hooks, training flag, users' attributes.

    Args:
        module: The batch norm of the blueprint.
        made: The blueprint.
        like: Device and dtype of parameters that have to be made, where ``module`` has no tensor to tell.
        near: A tensor of what is :func:`around`.
    """
    weight = module._parameters.get("weight")
    own = next((b for b in module._buffers.values() if b is not None and b.is_floating_point()), like)
    like = own if weight is None else weight
    new = made.make() if like is None else made.make(device=like.device, dtype=like.dtype)
    if new._parameters.get("weight") is not None and weight is not None:
        new._parameters.update({name: module._parameters[name] for name in _AFFINE if name in new._parameters})
    for name in STATISTICS:
        statistic = module._buffers.get(name)
        if statistic is not None and new._buffers.get(name) is not None:
            new._buffers[name] = statistic.float() if statistic.dtype in HALVES else statistic
            new._non_persistent_buffers_set |= module._non_persistent_buffers_set & {name}
            new.track_running_stats = module.track_running_stats
    fields = frozenset({*new.__dict__, *new._parameters, *new._buffers, *new._modules})
    _hand_over(module, new, _users(module, fields | _own_fields()))
    new.training = module.training
    _aim_hooks(new, module, new)
    own_dtype, dtype_around = (None if tensor is None else tensor.dtype for tensor in (like, near))
    set_origin(new, Origin(module, made.target, str(made), own_dtype, dtype_around, fields))
    new.register_load_state_dict_pre_hook(_take_batch_norms_checkpoint)
    if _one_value_per_features_row(module, new):
        new.register_forward_pre_hook(_refuse_features)
    return new


def restore_origin(module: nn.Module, near: Tensor | None) -> nn.Module:
    """The original of a replacement, with the tensors, hooks, users' attributes, flags, device and dtype it has now.

    Args:
        module: The replacement.
        near: A tensor of what is :func:`around`, which tells what was done to all where the replacement has no parameter.
    """
    origin = origin_of(module)
    assert origin is not None
    old = origin.module
    for name in ("_load_state_dict_pre_hooks", "_forward_pre_hooks"):
        hooks = module.__dict__[name]
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_take_batch_norms_checkpoint, _refuse_features):
                del hooks[key]
    _aim_hooks(module, module, old)
    for name in _users(old, origin.fields | _own_fields()):
        del old.__dict__[name]  # the replacement has it, or its user has taken it away
    _hand_over(module, old, _users(module, origin.fields | {ORIGIN, "_compiled_call_impl", *old.__dict__}))
    for name in {"eps", "momentum"} & origin.fields - {*TARGETS[origin.to].own}:
        setattr(old, name, getattr(module, name))
    mine = {**old._parameters, **old._buffers}
    followers = [name for name, tensor in mine.items() if tensor is not None and tensor.dtype == origin.dtype]
    taken = _take(old._parameters, module._parameters, _AFFINE)
    _take(old._buffers, module._buffers, STATISTICS)
    own = next((parameter for parameter in module._parameters.values() if parameter is not None), None)
    now = near if own is None else own
    if now is not None:
        as_it_was = own is None and now.dtype == origin.around
        _bring(old, now.device, origin.dtype if as_it_was else now.dtype, followers, taken)
    old.training = module.training
    return old


def put(layer_places: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Give ``module`` every place; the order of a parent's children stays."""
    for parent, key in layer_places:
        parent._modules[key] = module


def around(layer: Layer, model: nn.Module, replaced: set[int]) -> Tensor | None:
    """A tensor of what holds the layer, or of the model, but of no layer whose ``id`` is among ``replaced``."""
    for holder in (*(parent for parent, _ in layer.places), model):
        for module in holder.modules():
            for tensor in (
                (*module._parameters.values(), *module._buffers.values()) if id(module) not in replaced else ()
            ):
                if tensor is not None and tensor.is_floating_point():
                    return tensor
    return None


def like_tensor(layer: Layer, model: nn.Module) -> Tensor | None:
    """A tensor of the layer, of what holds it, or of the model: where the layer lives, and in which dtype."""
    for module in (layer.module, *(parent for parent, _ in layer.places), model):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None


def _process_group(module: nn.Module) -> object:
    if isinstance(module, SyncStatistics):
        return module.process_group
    group = module.__dict__.get("process_group")  # nn.SyncBatchNorm's
    return None if group is None else group_spec(group)


def _own_fields() -> set[str]:
    """Attributes that a batch norm sets itself; what else is in its ``__dict__`` is its user's."""
    return {*nn.BatchNorm1d(1, device="meta").__dict__, *OURS, "process_group"}


def _users(module: nn.Module, fields: Set[str]) -> list[str]:
    """Attributes of a layer that are neither ``fields`` nor hooks."""
    return [name for name in module.__dict__ if name not in fields and "_hook" not in name]


def _hand_over(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Give ``target`` the attributes of these names, and every hook."""
    target.__dict__.update({name: source.__dict__[name] for name in names})
    target.__dict__.update({name: value for name, value in source.__dict__.items() if "_hook" in name})


def _aim_hooks(holder: nn.Module, source: nn.Module, target: nn.Module) -> None:
    """Let state-dict hooks that were registered with their module call ``target``: torch remembers it in the hook."""
    for hook in holder.__dict__["_load_state_dict_pre_hooks"].values():
        if getattr(hook, "with_module", False) and hook.module() is source:
            hook.module = weakref.ref(target)


def _take(mine: dict[str, Any], theirs: dict[str, Any], names: Iterable[str]) -> list[str]:
    taken = [name for name in names if mine.get(name) is not None and theirs.get(name) is not None]
    mine.update({name: theirs[name] for name in taken})
    return taken


def _bring(
    old: nn.Module, device: torch.device, dtype: torch.dtype | None, followers: list[str], taken: list[str]
) -> None:
    """Move what the model did not see meanwhile to where the layer is now; followers come to ``dtype``."""
    for name, parameter in old._parameters.items():
        if parameter is not None and name not in taken:  # one that was dropped
            moved = _moved(parameter.detach(), name, device, dtype if name in followers else None)
            if parameter.is_meta == moved.is_meta:
                parameter.data = moved
            else:
                old._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in old._buffers.items():
        if buffer is not None:
            old._buffers[name] = _moved(buffer, name, device, dtype if name in followers else None)


def _moved(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if tensor.is_meta and device.type != "meta":
        fill = 1 if name in ("weight", "running_var") else 0
        return torch.full_like(tensor, fill, device=device, dtype=dtype)
    return tensor.to(device, dtype)


def _take_batch_norms_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a batch norm's checkpoint load strictly: what has no use here is passed over, what it has not stays as it is."""
    origin = origin_of(module)
    assert origin is not None
    mine, theirs = ({**each._parameters, **each._buffers} for each in (module, origin.module))
    new = {name for name, tensor in mine.items() if tensor is not None and theirs.get(name) is None}
    for name in (*_AFFINE, *STATISTICS):
        if mine.get(name) is None:
            state_dict.pop(prefix + name, None)
    if not any(prefix + name in state_dict for name in new):
        # torch before 0.4.1 had no counter.
        for name in new | ({"num_batches_tracked"} if mine.get("num_batches_tracked") is not None else set()):
            state_dict.setdefault(prefix + name, mine[name])


def _one_value_per_features_row(old: nn.Module, new: nn.Module) -> bool:
    takes_features = not isinstance(old, nn.BatchNorm2d | nn.BatchNorm3d)
    groups = new.num_groups if isinstance(new, nn.GroupNorm) else old.num_features
    return takes_features and isinstance(new, nn.GroupNorm | _InstanceNorm) and groups == old.num_features


def _refuse_features(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Features [N, C] have one value per sample and channel: normalised alone, each of them becomes the bias."""
    if arguments and isinstance(arguments[0], Tensor) and arguments[0].dim() == 2:
        raise ValueError(
            f"{type(module).__name__}({module.extra_repr()}) in place of a batch norm expects an input [N, C, *] of at least 3 "
            f"dims, got {list(arguments[0].shape)}: one value per group has no variance. Use to='layer_norm', or "
            "to='group_norm' with fewer groups, for this layer."
        )
