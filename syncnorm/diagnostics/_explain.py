"""Which path a layer's next call takes, and why not another. Runs no collective and changes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.calibration._layers import without_broadcast
from syncnorm.conversion._contexts import disabled
from syncnorm.conversion._fused_forward import FusedForward
from syncnorm.conversion._layers import display, find_layers, keeps_batch_statistics
from syncnorm.core.running import RunningStatistics
from syncnorm.diagnostics._trees import call
from syncnorm.distributed import GroupSpec, resolve
from syncnorm.distributed.collectives import is_initialized
from syncnorm.distributed.groups import known
from syncnorm.distributed.ledger import check_level
from syncnorm.distributed.wire import describe
from syncnorm.errors import SyncNormError
from syncnorm.functional._sync_batch_norm import _torch_serves
from syncnorm.kernels import BACKENDS, objections
from syncnorm.modules import SyncStatistics
from syncnorm.modules._mixed_statistics import MixedStatistics

__all__ = ["explain", "inputs_of"]


_UNFIT = "torch's batch_norm does not take these dtypes together, or would read its counter on the host"
_OWN_WAYS = {  # of families that torch's batch_norm does not serve in training
    "batch_renorm": "the result is corrected towards the running statistics",
    "ghost_batch_norm": "every ghost has statistics of its own",
    "moving_average_batch_norm": "it normalises by the last batches together",
}
_OFF_IN_GRAPH = "not inside torch.compile"
_CHECKS = {
    "off": "ranks compare only whether a backward follows (SYNCNORM_CHECK or syncnorm.set_check)",
    "inline": f"ranks compare layer, direction, call, channels and dtype in every exchange; {_OFF_IN_GRAPH}",
    "full": f"ranks compare layer, its settings, direction, call, channels and dtype in every exchange; {_OFF_IN_GRAPH}",
}


def explain(module: nn.Module, x: Any = None) -> str:
    """Say which path a synchronised layer takes and why: its group, the kernel backend, the wire, the running statistics.

    Only this rank is asked, so any rank may call it alone. No collective is made and no buffer moves. (FSDP gathers parameters
    when the model is run on ``x``: there all ranks call it, or none gives an input.)

    Args:
        module: One of our layers, or a model that contains some.
        x: An input of ``module``: for a layer a tensor [N, C, *], for a model a tensor, a tuple of positional or a
            dict of keyword arguments; the model is then run once in evaluation mode to see what reaches each layer.
            Without it the backends are not asked.

    Returns:
        Text, a paragraph for each of our layers and a line for batch norms that are not synchronised.

    Raises:
        TypeError: If ``module`` is no module, or the input of a layer no tensor.

    Example:
        >>> print(syncnorm.explain(syncnorm.SyncBatchNorm1d(8).eval()))
        SyncBatchNorm1d(8)
          group    world: no process group here, this rank alone
          path     evaluation: torch's batch_norm with the running statistics, no exchange
          buffers  running statistics float32 on cpu, updated by every batch
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain takes one of our layers or a model, got {type(module).__name__}.")
    if isinstance(module, SyncStatistics):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"the input of a layer is a tensor [N, C, *], got {type(x).__name__}.")
        return _explain_layer(module, "", x)
    layers = find_layers(module)
    ours = [(layer.names[0], layer.module) for layer in layers if isinstance(layer.module, SyncStatistics)]
    others = [layer for layer in layers if keeps_batch_statistics(layer.module)]
    others = [layer for layer in others if not isinstance(layer.module, SyncStatistics | MixedStatistics)]
    mixed = [(layer.names[0], layer.module) for layer in layers if isinstance(layer.module, MixedStatistics)]
    inputs = {} if x is None else inputs_of(module, [layer for _, layer in ours], x)
    fused = _fused(module)
    texts = [
        _explain_layer(layer, name, inputs.get(id(layer)), x is not None, fused.get(id(layer), ""))
        for name, layer in ours
    ]
    texts += [
        f"{display(name)}: {type(layer).__name__}, batch statistics as one part of several\n  group    {_group(layer)[0]}"
        for name, layer in mixed
    ]
    if others:
        named = ", ".join(f"{type(layer.module).__name__} {display(layer.names[0])}" for layer in others)
        texts.append(f"not synchronised: {named}; syncnorm.plan(model) says what convert would do")
    return "\n".join(texts) or "no layer uses batch statistics"


def _fused(model: nn.Module) -> dict[int, str]:
    """What the code of a block hands to a norm of it, by the norm."""
    blocks = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return {
        id(forward.block.get_submodule(norm)): f"{took} in the code of {display(name)}"
        for name, forward in blocks.items()
        if isinstance(forward, FusedForward)
        for norm, took in forward.took.items()
    }


def _explain_layer(layer: SyncStatistics, name: str, x: Tensor | None, ran: bool = False, took: str = "") -> str:
    group, size = _group(layer)
    lines = [("group", group), ("path", _path(layer, size, x, took))]
    if took:
        lines.append(("fused", f"takes in {took}; torch.compile sees the original code"))
    if _uses_batch(layer) and _walks(layer, size, x, took):
        lines += _backends(layer, x, ran)
        lines.append(("keeps", _kept(layer, took)))
    if _uses_batch(layer) and size != 1:
        lines += [("check", _CHECKS[check_level()]), ("wire", _wire(layer, x))]
    lines.append(("buffers", _buffers(layer)))
    head = f"{type(layer).__name__}({layer.num_features}){' ' + name if name else ''}"
    if x is not None:
        head += f" on {list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return "\n".join([head, *(f"  {label:<7}  {text}" for label, text in lines)])


def _group(layer: SyncStatistics | MixedStatistics) -> tuple[str, int | None]:
    """The group in words, and how many ranks it has as far as one rank can tell without meeting the others."""
    spec = layer._group_spec
    if not layer._sync:
        return f"{spec}: disabled, this rank alone", 1
    if spec.kind in ("named", "outside") or (spec.kind == "world" and is_initialized()):
        try:
            size = resolve(spec).size
        except SyncNormError as error:
            return f"{spec}: a training forward raises: {error}", None
        return f"{spec}: {size} ranks", size
    if not is_initialized():
        if layer._synced_over > 1:
            return f"{spec}: it had {layer._synced_over} ranks and now there is no process group, training raises", None
        return f"{spec}: no process group here, this rank alone", 1
    if spec.kind == "size":
        world = resolve(GroupSpec()).size
        if world % spec.size:
            return f"{spec.size} ranks each: a training forward raises, it does not divide the world of {world}", None
        return f"{spec.size} ranks each, of {world}", spec.size
    known = layer._synced_over or None
    return f"{spec}: {f'{known} ranks' if known else 'ranks are counted at the first training forward'}", known


def _path(layer: SyncStatistics, size: int | None, x: Tensor | None, took: str) -> str:
    if not _uses_batch(layer):
        which = (
            "the running statistics" if layer.running_mean is not None else "the batch of this rank (it tracks none)"
        )
        then = f", then {layer.activation}; in one pass where no gradient is needed" if layer.activation else ""
        mode = "training as in evaluation" if layer.training else "evaluation"
        return f"{mode}: torch's batch_norm with {which}{then}, no exchange"
    if not _walks(layer, size, x, took):
        return "training, one rank: torch's batch_norm itself, no exchange"
    if size == 1:
        return (
            f"training, one rank: the synchronised walk without an exchange, because {_why_walk(layer, took) or _UNFIT}"
        )
    over = "the ranks of its group" if size is None else f"{size} ranks"
    ghosts = getattr(layer, "_ranks_per_ghost", None)
    if ghosts is None:
        return f"training over {over}: one all-reduce forward, one backward"
    within = {
        0: "whether ghosts are of one rank or of several is agreed in the first training forward",
        1: "none backward, as a ghost is of one rank",
    }
    several = f"and one each way among the {ghosts} ranks of a ghost"
    return f"training over {over}: one all-reduce forward, for the running statistics; {within.get(ghosts, several)}"


def _uses_batch(layer: SyncStatistics) -> bool:
    return layer.training and layer.family != "frozen_batch_norm"


def _wire(layer: SyncStatistics, x: Tensor | None) -> str:
    try:
        group = known(layer._group_spec)
    except SyncNormError as error:
        return f"none: {error}"
    if group is None or not group.name:
        return "agreed by each group at its first exchange"
    own = layer.running_mean if layer.running_mean is not None else layer.weight
    device = x.device if x is not None else torch.device("cpu") if own is None else own.device
    return describe(group.name, device.type)


def _walks(layer: SyncStatistics, size: int | None, x: Tensor | None, took: str) -> bool:
    if size != 1 or _why_walk(layer, took):
        return True
    if x is None:
        return False
    tracked = layer.track_running_stats
    mean, var, counter = (
        getattr(layer, name) if tracked else None for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    return not _torch_serves(x, layer.weight, layer.bias, RunningStatistics(mean, var, counter, layer.momentum))


def _why_walk(layer: SyncStatistics, took: str) -> str:
    """What the layer has that torch's batch_norm has not; empty if nothing."""
    if layer.family in _OWN_WAYS:
        return _OWN_WAYS[layer.family]
    if layer.backend != "auto":
        return f"backend={layer.backend!r} was asked for by name"
    if layer.accumulate > 1:
        return "statistics are gathered over micro-batches"
    if layer.activation or layer.memory_efficient:
        return "the activation is applied in the same pass" if layer.activation else "the output is kept, not the input"
    if took:
        return "what follows is applied in the same pass"
    return "" if layer.on_nonfinite == "propagate" else f"on_nonfinite={layer.on_nonfinite!r}"


def _kept(layer: SyncStatistics, took: str) -> str:
    if layer.memory_efficient:
        return "the output, which the layer that follows keeps anyway, and a few numbers per channel"
    if layer.activation in ("relu", "leaky_relu"):
        return "the input, a few numbers per channel, and one bit an element where there is a residual"
    if took:
        return "the input, a few numbers per channel, and where a sum is taken in one bit an element (SiLU, GELU: the residual)"
    smooth = ", and the residual where there is one" if layer.activation else ""
    return f"the input and a few numbers per channel{smooth}"


def _backends(layer: SyncStatistics, x: Tensor | None, ran: bool) -> list[tuple[str, str]]:
    if x is None:
        why = "did not reach it" if ran else "is needed to ask the backends; pass one as x"
        return [("backend", f"{layer.backend!r} of {list(BACKENDS)}; an input {why}")]
    answers = objections(x)
    first = next((name for name, reason in answers.items() if reason is None), None)
    chosen = first if layer.backend == "auto" else layer.backend
    lines = []
    for name, reason in answers.items():
        says = "serves this input" if reason is None else reason
        mark = ", taken" if name == chosen and reason is None else ""
        mark = ", asked for by name: the call raises" if name == chosen and reason is not None else mark
        lines.append(("backend", f"{name}: {says}{mark}"))
    return [*lines, ("backend", "under torch.compile: reference, which Inductor fuses with its neighbours")]


def _buffers(layer: SyncStatistics) -> str:
    mean = layer.running_mean
    if mean is None:
        return "no running statistics"
    where = f"running statistics {str(mean.dtype).removeprefix('torch.')} on {mean.device}"
    if not layer.track_running_stats or layer.family == "frozen_batch_norm":
        return f"{where}, not updated ({'frozen' if layer.track_running_stats else 'track_running_stats is off'})"
    every = "by every batch" if layer.accumulate == 1 else f"once per {layer.accumulate} micro-batches"
    return f"{where}, updated {every}{' as a cumulative average' if layer.momentum is None else ''}"


def inputs_of(model: nn.Module, layers: Sequence[nn.Module], x: Any) -> dict[int, Tensor]:
    """What reaches each layer first when ``model`` is run on ``x``."""
    seen: dict[int, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensor = arguments[0] if arguments else named.get("input")
        if isinstance(tensor, Tensor):
            seen.setdefault(id(module), tensor)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with disabled(model), _evaluating(model), without_broadcast(model), torch.no_grad():
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
