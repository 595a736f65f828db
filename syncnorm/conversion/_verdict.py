"""What would happen to one layer, and why: swap, replace, keep or skip."""

from typing import Any, NamedTuple

import torch
from torch import nn

from syncnorm.conversion._adapters import LEFTOVERS, target_in_family, target_of
from syncnorm.conversion._layers import Layer, class_names, origin_of, qualified_type
from syncnorm.conversion._replace import Blueprint, blueprint
from syncnorm.conversion._targets import TARGETS, default_of
from syncnorm.distributed import group_spec
from syncnorm.modules import BatchNorm, SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["Verdict", "judge", "own_forward"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm)
_SYNCED = (SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
_BY_STATISTICS = ("batch_renorm", "frozen_batch_norm", "moving_average_batch_norm")
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_pending"}


class Verdict(NamedTuple):
    """What happens to a layer: ``swap``, ``replace``, ``keep`` or ``skip``; the name of its new class; and why.

    Further, where it is replaced, the names of parameters and buffers that the new layer has, or has not, unlike the old;
    and the class itself.
    """

    action: str
    target: str
    reason: str
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    layer: type[nn.Module] | None = None


def judge(layer: Layer, to: str, options: dict[str, Any]) -> Verdict:
    """Decide about one selected layer. ``skip`` is for what a user might have expected to be converted."""
    module = layer.module
    origin = origin_of(module)
    kept = type(module).__name__
    if origin is not None:
        if (
            origin.to == to
            and origin.made == str(blueprint(origin.module, to, options))
            and not _regroups(module, options)
        ):
            return Verdict("keep", kept, f"converted to {to} before", layer=type(module))
        return Verdict("skip", kept, f"took the place of {type(origin.module).__name__}; syncnorm.revert(model) first")
    if isinstance(module, MixedStatistics):
        return Verdict("keep", kept, "no batch norm; shares its batch statistics over ranks by itself")
    obstacle = _obstacle(layer)
    if obstacle is not None:
        return Verdict("skip", kept, obstacle)
    return _swap(module, to, options) if TARGETS[to].swaps else _replace(layer, to, options)


def _regroups(module: nn.Module, options: dict[str, Any]) -> bool:
    group = options.get("process_group")
    return group is not None and group_spec(group) != getattr(module, "_group_spec", None)


def _obstacle(layer: Layer) -> str | None:
    """Why neither a swap nor a replacement would be right."""
    module = layer.module
    own_class = type(module).__name__
    if layer.metric is not None:
        return f"inside a torchmetrics metric ({layer.metric}), which meets other ranks in its own way; leave it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy, its channels are not known yet; run one forward pass, then convert"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted by TorchScript; convert the model in Python, and script what syncnorm.revert gives back"
    if "parametrizations" in module._modules:
        return "parametrized; torch.nn.utils.parametrize.remove_parametrizations, convert, and parametrize again"
    if _is_of_quantisation(module):
        return "a quantised layer, which has no batch statistics to share; convert before quantisation"
    if own_forward(module):
        return own_forward(module)
    if target_of(type(module)) is None and not isinstance(module, SyncStatistics):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{own_class} may do more than batch norm; syncnorm.register_adapter teaches it, or exclude it"
        return f"{own_class} keeps running statistics and is not a torch batch norm; rewrite it, or exclude it"
    return None


def _is_of_quantisation(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic"))


def own_forward(module: nn.Module) -> str:
    """Why a swap of the class would go unnoticed; empty if it would not."""
    replaced = "forward" in module.__dict__
    return "forward was replaced on the object (by a hook of another library?); convert before that" if replaced else ""


def _swap(module: nn.Module, to: str, options: dict[str, Any]) -> Verdict:
    own = type(module).__name__
    if isinstance(module, SyncStatistics) and module.family == to:
        news = [f"process_group={group_spec(options['process_group'])}"] if _regroups(module, options) else []
        others = [name for name in TARGETS[to].parameters if name != "process_group"]
        news += [f"{name}={options[name]}" for name in others if _differs(module, name, options)]
        return (
            Verdict("swap", own, f"new settings: {', '.join(news)}", layer=type(module))
            if news
            else Verdict(
                "keep", own, f"{'synchronised' if to == 'sync_batch_norm' else 'there'} already", layer=type(module)
            )
        )
    target = target_in_family(type(module), to)
    if to in _BY_STATISTICS and module._buffers.get("running_mean") is None:
        return Verdict("skip", own, f"it has no running statistics, which {to} needs; exclude it")
    if target is None:
        return Verdict(
            "skip", own, f"{own} has no counterpart in {to}, which is for BatchNorm1d, 2d and 3d; exclude it"
        )
    group, own_group = options.get("process_group"), module.__dict__.get("process_group")
    reason = f"group {group_spec(group)}"
    if isinstance(module, SyncStatistics):
        reason = f"from {module.family}"
    elif group is None and own_group is not None:
        reason = f"group {group_spec(own_group)}, as it had"
    remark = TARGETS[to].remark
    reason = f"{reason}; {remark}" if "process_group" in TARGETS[to].parameters and remark else remark or reason
    return Verdict("swap", target.__name__, "; ".join([reason, *_dropped(module)]), layer=target)


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
    if getattr(module, "activation", None) is not None:
        return Verdict("skip", own, f"it applies {module.activation!r} too, which {to} would lose; exclude it")
    folding = [type(parent).__name__ for parent, _ in layer.places if _is_of_quantisation(parent)]
    if folding:
        return Verdict(
            "skip", own, f"{folding[0]} of torch.ao folds it into a convolution; convert before fusion and QAT"
        )
    if module.__dict__.get("_compiled_call_impl") or any(key == "_orig_mod" for _, key in layer.places):
        return Verdict(
            "skip", own, "torch.compile was given this very layer and would not see another; convert before compiling"
        )
    made = blueprint(module, to, options)
    if made is None:
        return Verdict("skip", own, "does not know whether it is 1d, 2d or 3d; syncnorm.revert(model, dim=...) first")
    before, after = (_tensors(each) for each in (module, made.make(device="meta")))
    new, dropped = [name for name in after if name not in before], [name for name in before if name not in after]
    parts = [
        _coarser(made, options),
        _said([name for name in after if name in before], "carried over") or ("" if new else "without weight and bias"),
        _said(new, "new"),
        _said(dropped, "dropped"),
        *_settings(module, made, options),
    ]
    return Verdict(
        "replace", str(made), "; ".join(part for part in parts if part), tuple(new), tuple(dropped), made.layer
    )


def _tensors(module: nn.Module) -> list[str]:
    tensors = {**module._parameters, **module._buffers}
    return [name for name, tensor in tensors.items() if tensor is not None and name != "_pending"]


def _said(names: list[str], what: str) -> str:
    """``weight, bias and running statistics carried over``; the counter goes with the statistics."""
    words = [name.replace("running_var", "running variance") for name in names if name != "num_batches_tracked"]
    if "running_mean" in words:
        words.remove("running_mean")
        both = "running variance" in words
        words = [word for word in words if word != "running variance"]
        words.append("running statistics" if both else "running mean")
    text = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{what} {text}" if what == "new" and text else text and f"{text} {what}"


def _coarser(made: Blueprint, options: dict[str, Any]) -> str:
    """That the number of groups which was asked for does not divide the channels."""
    if "num_groups" in TARGETS[made.target].options:
        asked = options.get("num_groups", default_of(made.target, "num_groups"))
        groups = made.arguments["num_groups"]
        if groups != asked:
            return f"{asked} does not divide {made.num_features}, {groups} = gcd({asked}, {made.num_features}) does"
    return ""


def _dropped(module: nn.Module) -> list[str]:
    """Settings that SyncBatchNorm alone has."""
    if not isinstance(module, SyncStatistics):
        return []
    defaults = {"accumulate": 1, "memory_efficient": False, "on_nonfinite": "propagate"}
    own = {name: getattr(module, name) for name in defaults}
    return [f"{name}={value!r} dropped" for name, value in own.items() if value != defaults[name]]


def _settings(module: nn.Module, made: Blueprint, options: dict[str, Any]) -> list[str]:
    """What decides, apart from tensors, whether the network still does what it did."""
    target, said = TARGETS[made.target], []
    if "process_group" in target.parameters:
        said.append(f"group {group_spec(made.arguments['process_group'])}")
    said += _dropped(module)
    if "eps" in target.own and (eps := made.arguments.get("eps", default_of(made.target, "eps"))) != module.eps:
        said.append(f"eps={eps}, not {module.eps}")
    if target.activates and made.arguments.get("tlu", True):
        said.append(f"activates too{'' if options.get('fuse') else ': remove the activation that follows'}")
    return said
