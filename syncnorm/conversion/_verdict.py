"""What would happen to one layer, and why: swap, replace, keep or skip."""

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from syncnorm.conversion._adapters import LEFTOVERS, target_in_family, target_of
from syncnorm.conversion._layers import Layer, class_names, origin_of, qualified_type
from syncnorm.conversion._replace import describe_norm, num_groups_for, replacement_name
from syncnorm.conversion._targets import STATISTICS_FAMILIES, TARGET_OPTIONS
from syncnorm.distributed import group_spec
from syncnorm.modules import BatchNorm, SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["Verdict", "judge"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm)
_SYNCED = (SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_pending"}


class Verdict(NamedTuple):
    """What happens to a layer: ``swap``, ``replace``, ``keep`` or ``skip``; the name of its new class; and why."""

    action: str
    target: str
    reason: str


def judge(layer: Layer, to: str, options: dict[str, Any]) -> Verdict:
    """Decide about one selected layer. ``skip`` is for what a user might have expected to be converted."""
    module = layer.module
    origin = origin_of(module)
    kept = type(module).__name__
    if isinstance(module, MixedStatistics):
        return Verdict("keep", kept, "no batch norm; shares its batch statistics over ranks by itself")
    if origin is not None:
        if origin.to == to and replacement_name(origin.module, to, options) == describe_norm(module):
            return Verdict("keep", kept, f"converted to {to} before")
        return Verdict("skip", kept, f"took the place of {type(origin.module).__name__}; syncnorm.revert(model) first")
    obstacle = _obstacle(layer)
    if obstacle is not None:
        return Verdict("skip", kept, obstacle)
    return _swap(module, to, options) if to in STATISTICS_FAMILIES else _replace(layer, to, options)


def _obstacle(layer: Layer) -> str | None:
    """Why neither a swap nor a replacement would be right."""
    module = layer.module
    own_class = type(module).__name__
    if layer.metric is not None:
        return f"inside a torchmetrics metric ({layer.metric}), which meets other ranks in its own way; leave it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy, its channels are not known yet; run one forward pass, then convert"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted by TorchScript; convert before scripting"
    if "parametrizations" in module._modules:
        return "parametrized; torch.nn.utils.parametrize.remove_parametrizations, convert, and parametrize again"
    if type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")):
        return "a quantised layer, which has no batch statistics to share; convert before quantisation"
    if "forward" in module.__dict__:
        return "forward was replaced on the object (by a hook of another library?); convert before that"
    if target_of(type(module)) is None and not isinstance(module, SyncStatistics):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{own_class} may do more than batch norm; syncnorm.register_adapter teaches it, or exclude it"
        return f"{own_class} keeps running statistics and is not a torch batch norm; rewrite it, or exclude it"
    return None


def _swap(module: nn.Module, to: str, options: dict[str, Any]) -> Verdict:
    if isinstance(module, SyncStatistics) and module.family == to:
        news = []
        group = options.get("process_group")
        if group is not None and group_spec(group) != module._group_spec:
            news.append(f"process_group={group_spec(group)}")
        news += [f"{name}={options[name]}" for name in TARGET_OPTIONS[to][1:] if _differs(module, name, options)]
        own = type(module).__name__
        return (
            Verdict("swap", own, f"new settings: {', '.join(news)}")
            if news
            else Verdict("keep", own, "synchronised already" if to == "sync_batch_norm" else "there already")
        )
    target = target_in_family(type(module), to)
    if target is None:
        own = type(module).__name__
        return Verdict(
            "skip", own, f"{own} has no counterpart in {to}, which is for BatchNorm1d, 2d and 3d; exclude it"
        )
    if to == "frozen_batch_norm":
        return Verdict("swap", target.__name__, "statistics and affine parameters stay as they are")
    if isinstance(module, SyncStatistics):
        return Verdict("swap", target.__name__, f"from {module.family}")
    group = options.get("process_group")
    if group is None and module.__dict__.get("process_group") is not None:
        return Verdict("swap", target.__name__, f"group {group_spec(module.__dict__['process_group'])}, as it had")
    return Verdict("swap", target.__name__, f"group {group_spec(group)}")


def _differs(module: nn.Module, name: str, options: dict[str, Any]) -> bool:
    return name in options and bool(options[name] != getattr(module, name))


def _replace(layer: Layer, to: str, options: dict[str, Any]) -> Verdict:
    module, own = layer.module, type(layer.module).__name__
    if "FSDPModule" in class_names(module):
        return Verdict("skip", own, "fully_shard was applied to this very layer; convert before sharding")
    if type(module) not in (*_PLAIN, *_SYNCED) and qualified_type(type(module)) not in LEFTOVERS:
        return Verdict(
            "skip", own, f"{own} does more than batch norm, which {to} would lose; replace it by hand, or exclude it"
        )
    extra = {*module._parameters, *module._buffers, *module._modules} - _STATE
    if extra:
        what = (
            "pruned or weight-normed" if "weight_orig" in extra or "weight_g" in extra else f"it holds {sorted(extra)}"
        )
        return Verdict("skip", own, f"{what}, which {to} would lose; make it permanent or remove it, then convert")
    if module.__dict__.get("_compiled_call_impl") or any(key == "_orig_mod" for _, key in layer.places):
        return Verdict(
            "skip", own, "torch.compile was given this very layer and would not see another; convert before compiling"
        )
    target = replacement_name(module, to, options)
    if target is None:
        return Verdict("skip", own, "does not know whether it is 1d, 2d or 3d; syncnorm.revert(model, dim=...) first")
    return Verdict("replace", target, _replace_reason(module, to, options))


def _replace_reason(module: nn.Module, to: str, options: dict[str, Any]) -> str:
    num_features = int(cast(int, module.num_features))
    reason = (
        "weight and bias carried over" if module._parameters.get("weight") is not None else "without weight and bias"
    )
    affine = options.get("affine")
    if affine is not None and affine != (module._parameters.get("weight") is not None):
        reason = "new weight and bias" if affine else "weight and bias dropped"
    if to == "group_norm":
        asked = options.get("num_groups", 32)
        groups = num_groups_for(num_features, asked)
        if groups != asked:
            reason = f"{asked} does not divide {num_features}, {groups} = gcd({asked}, {num_features}) does; {reason}"
    return reason
