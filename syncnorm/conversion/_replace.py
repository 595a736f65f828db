"""Another module takes the place of a batch norm, in every parent that holds it, and can give the place back.

Parameters are the same objects, so optimizers, DDP and EMA copies keep them. Hook dictionaries are the same objects
too, so a handle removes its hook wherever the hook has gone.
"""

import math
import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from syncnorm.conversion._layers import Layer, Origin, origin_of, set_origin

__all__ = [
    "build_replacement",
    "describe_norm",
    "like_tensor",
    "num_groups_for",
    "put",
    "replacement_name",
    "restore_origin",
]

_INSTANCE_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}
_BATCH_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def num_groups_for(num_features: int, asked: int) -> int:
    """``asked`` where it divides ``num_features``, else their greatest common divisor."""
    return math.gcd(num_features, asked)


def replacement_name(module: nn.Module, to: str, options: dict[str, Any]) -> str | None:
    """How the replacement prints; None where the target needs a number of dims that ``module`` does not know."""
    made = _bare(module, to, options)
    return None if made is None else describe_norm(made)


def describe_norm(module: nn.Module) -> str:
    """``GroupNorm(8, 64)`` and the like: what two replacements must have in common to be the same."""
    sizes = (module.num_groups, module.num_channels) if isinstance(module, nn.GroupNorm) else (module.num_features,)
    affine = "" if module._parameters.get("weight") is not None else ", affine=False"
    return f"{type(module).__name__}({', '.join(map(str, sizes))}{affine})"


def build_replacement(module: nn.Module, to: str, options: dict[str, Any], like: Tensor | None) -> nn.Module:
    """A layer of kind ``to`` with what ``module`` has: parameters, hooks, training flag, and other people's attributes.

    Args:
        module: A batch norm for which :func:`replacement_name` has a name.
        to: Target.
        options: Its options.
        like: Device and dtype of parameters that have to be made, where ``module`` has no tensor to tell.
    """
    new = _bare(module, to, options)
    assert new is not None
    new._parameters.update(_parameters(module, options, like))
    for name, value in module.__dict__.items():
        if "_hook" in name or (name not in new.__dict__ and name not in _own_fields(module)):
            new.__dict__[name] = value
    new.training = module.training
    _aim_hooks(new, module, new)
    new.register_load_state_dict_pre_hook(_drop_batch_statistics)
    if _one_value_per_features_row(module, new):
        new.register_forward_pre_hook(_refuse_features)
    weight = module._parameters.get("weight")
    set_origin(new, Origin(module, to, None if weight is None else weight.dtype))
    return new


def restore_origin(module: nn.Module, like: Tensor | None) -> nn.Module:
    """The original of a replacement, with the parameters, hooks, training flag and device it has now."""
    origin = origin_of(module)
    assert origin is not None
    old = origin.module
    for name in ("_load_state_dict_pre_hooks", "_forward_pre_hooks"):
        hooks = module.__dict__[name]
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_drop_batch_statistics, _refuse_features):
                del hooks[key]
    _aim_hooks(module, module, old)
    for name, value in module.__dict__.items():
        if "_hook" in name:
            old.__dict__[name] = value
    now: Tensor | None = module._parameters.get("weight")
    if now is not None and old._parameters.get("weight") is not None:
        old._parameters.update({name: module._parameters[name] for name in ("weight", "bias")})
    now = like if now is None else now
    if now is not None:
        _bring(old, now, origin.dtype)
    old.training = module.training
    return old


def put(layer_places: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Give ``module`` every place; the order of a parent's children stays."""
    for parent, key in layer_places:
        parent._modules[key] = module


def like_tensor(layer: Layer, model: nn.Module) -> Tensor | None:
    """A tensor of the layer, of what holds it, or of the model: where the layer lives, and in which dtype."""
    for module in (layer.module, *(parent for parent, _ in layer.places), model):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None


def _bare(module: nn.Module, to: str, options: dict[str, Any]) -> nn.Module | None:
    num_features, eps = int(cast(int, module.num_features)), float(cast(float, module.eps))
    affine = options.get("affine")
    affine = module._parameters.get("weight") is not None if affine is None else affine
    arguments: dict[str, Any] = {"affine": affine, "device": "meta"}  # its own parameters never come to be
    made: nn.Module | None
    if to == "instance_norm":
        kinds = [target for source, target in _INSTANCE_NORMS.items() if isinstance(module, source)]
        made = kinds[0](num_features, eps=eps, **arguments) if kinds else None
    else:
        groups = 1 if to == "layer_norm" else num_groups_for(num_features, options.get("num_groups", 32))
        made = nn.GroupNorm(groups, num_features, eps=eps, **arguments)
    if made is not None and affine and _bias_missing(module):
        made.register_parameter("bias", None)
    return made


def _bias_missing(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None and module._parameters.get("bias") is None


def _parameters(module: nn.Module, options: dict[str, Any], like: Tensor | None) -> dict[str, nn.Parameter | None]:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    affine = options.get("affine")
    if affine is False:
        return {"weight": None, "bias": None}
    if affine is None or weight is not None:
        return {"weight": weight, "bias": bias}
    own = next((b for b in module._buffers.values() if b is not None and b.is_floating_point()), like)
    ones = torch.ones(cast(int, module.num_features)) if own is None else own.new_ones(cast(int, module.num_features))
    return {"weight": nn.Parameter(ones), "bias": nn.Parameter(torch.zeros_like(ones))}


def _own_fields(module: nn.Module) -> set[str]:
    """Attributes that a batch norm sets itself; what else is in its ``__dict__`` is its user's."""
    ours = {"_group_spec", "_origin", "_sync", "_synced_over", "_torch_group", "accumulate", "backend", "process_group"}
    return {*nn.BatchNorm1d(1, device="meta").__dict__, *ours}


def _aim_hooks(holder: nn.Module, source: nn.Module, target: nn.Module) -> None:
    """Let state-dict hooks that were registered with their module call ``target``: torch remembers it in the hook."""
    for hook in holder.__dict__["_load_state_dict_pre_hooks"].values():
        if getattr(hook, "with_module", False) and hook.module() is source:
            hook.module = weakref.ref(target)


def _bring(old: nn.Module, now: Tensor, dtype_before: torch.dtype | None) -> None:
    """Move what the model did not see meanwhile to where the layer is now, and to its dtype if it shared that."""
    for parameter in old._parameters.values():
        if parameter is not None and parameter.device != now.device:  # dropped by affine=False
            parameter.data = parameter.data.to(now.device, now.dtype)
    for name, buffer in old._buffers.items():
        if buffer is None:
            continue
        dtype = now.dtype if buffer.is_floating_point() and buffer.dtype == dtype_before else buffer.dtype
        if buffer.is_meta and not now.is_meta:
            fill = 1 if name == "running_var" else 0
            old._buffers[name] = torch.full_like(buffer, fill, device=now.device, dtype=dtype)
        elif buffer.device != now.device or buffer.dtype != dtype:
            old._buffers[name] = (
                buffer.to(now.device, dtype) if not now.is_meta else torch.empty_like(buffer, device="meta")
            )


def _drop_batch_statistics(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a batch norm's checkpoint load strictly: this layer has no use for its running statistics."""
    for name in _BATCH_BUFFERS:
        state_dict.pop(prefix + name, None)


def _one_value_per_features_row(old: nn.Module, new: nn.Module) -> bool:
    groups = new.num_groups if isinstance(new, nn.GroupNorm) else new.num_features
    takes_features = not isinstance(old, nn.BatchNorm2d | nn.BatchNorm3d)
    return takes_features and groups == old.num_features


def _refuse_features(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Features [N, C] have one value per sample and channel: normalised alone, each of them becomes the bias."""
    if arguments and isinstance(arguments[0], Tensor) and arguments[0].dim() == 2:
        raise ValueError(
            f"{describe_norm(module)} in place of a batch norm expects an input [N, C, *] of at least 3 dims, got "
            f"{list(arguments[0].shape)}: one value per group has no variance. Use to='layer_norm', or to='group_norm' "
            "with fewer groups, for this layer."
        )
