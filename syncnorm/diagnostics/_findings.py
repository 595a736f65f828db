"""What can be seen wrong with a model, and with the Trainer it is for, before any step: the eyes of doctor."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.conversion._layers import Layer, class_names, display, find_layers, keeps_batch_statistics
from syncnorm.conversion._plan import plan, shorten
from syncnorm.conversion._validate import is_norm
from syncnorm.diagnostics._explain import inputs_of
from syncnorm.distributed.groups import GroupSpec
from syncnorm.modules import SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics
from syncnorm.modules._state_faults import state_faults

__all__ = ["Finding", "Subject", "find"]

_HALVES = (torch.float16, torch.bfloat16)
_SHARED = (SyncStatistics, MixedStatistics)


@dataclass(frozen=True)
class Finding:
    """Something to mend.

    Attributes:
        code: A short name, always the same for the same thing.
        problem: What is there and what it does.
        fix: What to do.
        layers: Where.
    """

    code: str
    problem: str
    fix: str
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" [{shorten(list(self.layers))}]" if self.layers else ""
        return f"{self.code}: {self.problem}{where}. {self.fix}"


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        model: The model.
        input: An input of it, as one rank would get it; None if there is none.
        trainer: The Lightning Trainer it is for; None if there is none.
        ranks: How many ranks will run it; None if that is not known.
    """

    model: nn.Module
    input: Any = None
    trainer: Any = None
    ranks: int | None = None


def find(subject: Subject) -> list[Finding]:
    """Everything that is known to go wrong and can be seen in ``subject``. Changes nothing and meets nobody.

    With an input the model is run once, in evaluation mode and without gradients, to see the shapes that reach its layers.

    Raises:
        ValueError: If it fails on its input.
    """
    layers = find_layers(subject.model, is_norm)
    batch = [layer for layer in layers if keeps_batch_statistics(layer.module)]
    found = [*_left(subject), *_state(layers), *_groups(layers, subject.ranks), *_modes(subject.model, batch)]
    found += [*_plain(batch), *_checkpoints(subject.model), *_rivals(subject, batch), *_broadcast(subject.model, batch)]
    found += _small(subject, batch)
    alike: dict[Finding, list[str]] = {}
    for finding in found:
        alike.setdefault(replace(finding, layers=()), []).extend(finding.layers)
    return [replace(finding, layers=tuple(names)) for finding, names in alike.items()]


def _left(subject: Subject) -> Iterator[Finding]:
    """Batch norms that are of one rank only."""
    converted_later = _callback(subject.trainer) is not None or _layer_sync(subject.trainer) == "SyncNormPlugin"
    entries = plan(subject.model).entries
    local = [e for e in entries if e.action == "swap" and not isinstance(e._layer.module, _SHARED)]
    local = [
        e for e in local if e._layer.module.training or not subject.model.training
    ]  # else _modes has a word for it
    torchs = [display(e.name) for e in local if isinstance(e._layer.module, nn.SyncBatchNorm)]
    others = [display(e.name) for e in local if not isinstance(e._layer.module, nn.SyncBatchNorm)]
    if others and not converted_later:
        yield Finding(
            "not-synchronised",
            f"{len(others)} batch norms use the statistics of their own rank only",
            "Call syncnorm.convert(model), or give the Trainer callbacks=[syncnorm.SyncNorm()].",
            tuple(others),
        )
    if torchs and not converted_later:
        yield Finding(
            "torch-sync-batch-norm",
            "torch's SyncBatchNorm is for accelerators only, and each of its layers gathers from all ranks",
            "syncnorm.convert(model) takes it over, with its group.",
            tuple(torchs),
        )
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry.action == "skip":
            reasons.setdefault(entry.reason, []).append(display(entry.name))
    for reason, names in reasons.items():
        yield Finding(
            "left-by-convert", f"convert would leave it: {reason}", "syncnorm.plan(model) shows all.", tuple(names)
        )


def _state(layers: list[Layer]) -> Iterator[Finding]:
    for layer in layers:
        tensors = {**layer.module._parameters, **layer.module._buffers}
        state = {name: tensor for name, tensor in tensors.items() if tensor is not None and name[0] != "_"}
        for name, fault in state_faults(layer.module, state).items():
            yield Finding(
                "broken-state",
                f"{name} {fault}",
                "Load a sound checkpoint (syncnorm.validate_state_dict looks at one), or reset the layer.",
                (display(layer.names[0]),),
            )


def _groups(layers: list[Layer], ranks: int | None) -> Iterator[Finding]:
    for layer in layers:
        spec, where = getattr(layer.module, "_group_spec", None), (display(layer.names[0]),)
        if not isinstance(spec, GroupSpec):
            continue
        fix = "Give every rank a group that contains it, such as process_group=2 or syncnorm.distributed.make_subgroups(2)."
        if spec.kind == "outside":
            yield Finding("outside-group", "this rank has no part in the layer's group: training raises", fix, where)
        if spec.kind == "named" and ranks is not None and (out := sorted({*range(ranks)} - {*spec.ranks})):
            problem = f"its group of ranks {list(spec.ranks)} leaves out ranks {out}: training raises on those"
            yield Finding("outside-group", problem, fix, where)
        if spec.kind == "size" and ranks is not None and ranks % spec.size:
            problem = f"process_group={spec.size} does not divide {ranks} ranks: training raises"
            divisors = [k for k in range(1, ranks + 1) if ranks % k == 0]
            yield Finding("group-size", problem, f"Choose one of {divisors}.", where)
        if spec.kind == "size" and spec.size == 1:
            problem = "process_group=1 gives every rank a group of its own: nothing is synchronised"
            yield Finding("group-size", problem, 'Use process_group="world", or the number of ranks that share.', where)


def _modes(model: nn.Module, batch: list[Layer]) -> Iterator[Finding]:
    frozen = "FrozenBatchNorm"
    still = [layer for layer in batch if model.training and not layer.module.training]
    names = tuple(display(layer.names[0]) for layer in still if frozen not in type(layer.module).__name__)
    if names:
        yield Finding(
            "evaluating",
            "in evaluation mode while the model trains: their statistics stand still and meet nobody",
            'Say so with syncnorm.convert(model, to="frozen_batch_norm", include=[...]), or call model.train() on every rank.',
            names,
        )


def _plain(batch: list[Layer]) -> Iterator[Finding]:
    """What torch's own layers do badly and ours do not."""
    torchs = [layer for layer in batch if not isinstance(layer.module, _SHARED)]
    fix = "syncnorm's layers do not; convert, or choose another setting."
    halves = [layer for layer in torchs if getattr(layer.module.running_var, "dtype", None) in _HALVES]
    if halves:
        problem = "running statistics in half precision, which a momentum of 0.1 hardly moves"
        yield Finding("half-statistics", problem, fix, tuple(display(layer.names[0]) for layer in halves))
    average = [layer for layer in torchs if getattr(layer.module, "momentum", 0.1) is None and _on_cuda(layer.module)]
    if average:
        problem = "momentum=None makes the host wait for the device at every call"
        yield Finding("momentum-none", problem, fix, tuple(display(layer.names[0]) for layer in average))
    single = [layer for layer in batch if getattr(layer.module, "virtual_batch_size", 0) == 1]
    if single:
        problem = "virtual_batch_size=1 normalises every sample by itself in training, and by all in evaluation"
        names = tuple(display(layer.names[0]) for layer in single)
        yield Finding("batch-of-one", problem, "Use a larger one, or instance norm.", names)


def _on_cuda(module: nn.Module) -> bool:
    return torch.cuda.is_available() or any(tensor.is_cuda for tensor in module.buffers())


def _checkpoints(model: nn.Module) -> Iterator[Finding]:
    names: dict[str, list[str]] = {}
    for module in model.modules():
        how = _checkpointed(module)
        for layer in find_layers(module) if how else ():
            if not isinstance(layer.module, _SHARED):
                names.setdefault(how, []).append(display(_name_in(model, layer.module)))
    for how, inside in names.items():
        yield Finding(
            "checkpointed",
            f"torch's batch norm moves its running statistics twice a step where its forward is recomputed ({how})",
            "syncnorm.convert(model): its layers know a recompute.",
            tuple(dict.fromkeys(inside)),
        )


def _checkpointed(module: nn.Module) -> str:
    """How it is seen that ``module`` recomputes its forward; empty if it is not."""
    if "_checkpoint_wrapped_module" in module._modules:
        return "checkpoint_wrapper"
    for flag in ("gradient_checkpointing", "grad_checkpointing"):  # Hugging Face's and timm's
        if getattr(module, flag, False) is True:
            return f"{flag}=True"
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    called = {"checkpoint", "checkpoint_sequential"} & set(code.co_names if code else ())
    return f"{type(module).__name__}.forward calls {min(called)}" if called else ""


def _name_in(model: nn.Module, module: nn.Module) -> str:
    found: str = next(name for name, each in model.named_modules() if each is module)
    return found


def _rivals(subject: Subject, batch: list[Layer]) -> Iterator[Finding]:
    ours = _callback(subject.trainer) is not None or any(isinstance(layer.module, SyncStatistics) for layer in batch)
    if ours and _layer_sync(subject.trainer) == "TorchSyncBatchNorm":
        yield Finding(
            "sync-batchnorm-flag",
            "Trainer(sync_batchnorm=True) would rebuild these layers as torch's SyncBatchNorm, which refuses CPU",
            "Remove sync_batchnorm=True.",
        )
    torchs = tuple(display(layer.names[0]) for layer in batch if isinstance(layer.module, nn.SyncBatchNorm))
    if torchs and any(isinstance(layer.module, SyncStatistics) for layer in batch):
        problem = "torch's SyncBatchNorm beside syncnorm's: two kinds of exchange, and only one is checked"
        yield Finding("two-kinds", problem, "syncnorm.convert(model) makes them one kind.", torchs)


def _broadcast(model: nn.Module, batch: list[Layer]) -> Iterator[Finding]:
    if "DistributedDataParallel" not in class_names(model) or not getattr(model, "broadcast_buffers", False):
        return
    own = [
        layer for layer in batch if isinstance(layer.module, SyncStatistics) and layer.module._group_spec != GroupSpec()
    ]
    if own:
        yield Finding(
            "broadcast-buffers",
            "DDP overwrites the running statistics of each group with those of rank 0 before every forward",
            "Set ddp_model.broadcast_buffers = False.",
            tuple(display(layer.names[0]) for layer in own),
        )


def _small(subject: Subject, batch: list[Layer]) -> Iterator[Finding]:
    """Batches too small for a variance, by the shapes that reach the layers."""
    if subject.input is None:
        return
    try:
        seen = inputs_of(subject.model, [layer.module for layer in batch], subject.input)
    except Exception as error:
        raise ValueError(f"the model fails on its input: {type(error).__name__}: {error}") from error
    for layer in batch:
        x: Tensor | None = seen.get(id(layer.module))
        if x is None or x.dim() < 2 or not layer.module.training or "Frozen" in type(layer.module).__name__:
            continue
        ranks = (subject.ranks or 1) if isinstance(layer.module, _SHARED) else 1
        values, where = ranks * (x.numel() // x.size(1)), (display(layer.names[0]),)
        got = f"an input {list(x.shape)} {f'on each of {ranks} ranks' if ranks > 1 else 'on one rank'}"
        fix = 'Synchronise over more ranks, use larger batches, or a norm without a batch (to="group_norm").'
        if values <= 1:
            yield Finding(
                "batch-of-one", f"{got} is one value per channel, which has no variance: training raises", fix, where
            )
        elif x.size(0) * ranks == 1:
            yield Finding("batch-of-one", f"{got} makes statistics of a single sample", fix, where)


def _callback(trainer: Any) -> Any:
    """The SyncNorm callback of a Lightning Trainer; looked for by name, as Lightning is not imported here."""
    callbacks = getattr(trainer, "callbacks", [])
    return next((c for c in callbacks if any(cls.__name__ == "SyncNorm" for cls in type(c).__mro__)), None)


def _layer_sync(trainer: Any) -> str:
    found: object = getattr(getattr(trainer, "strategy", None), "_layer_sync", None)
    return type(found).__name__
