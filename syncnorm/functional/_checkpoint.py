"""Recognises activation checkpointing, so that a recomputed layer neither counts a batch twice nor meets its ranks again.

A recompute is tied to its forward by the checkpointed region itself (the frame object of ``use_reentrant=False``, the
autograd context of ``use_reentrant=True``), never by comparing values: what one rank recognises, all do. Where a region
is not recognised, the statistics are still updated once and the exchange is simply made again.

The private hooks of torch that this needs live in this file alone; ``tests/test_checkpoint.py`` fails if they go.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from syncnorm.distributed.ledger import Call

__all__ = ["is_recomputing", "is_selective", "recall_call", "remember_call", "unseen_by_selective_checkpointing"]

_MOMENTS = "_syncnorm_moments"
_REENTRANT = (checkpoint.CheckpointFunction.forward.__code__, checkpoint.CheckpointFunction.backward.__code__)
_SELECTIVE = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


def is_recomputing() -> bool:
    """Whether this call runs inside a backward pass, as the recompute of a checkpointed forward does.

    A recompute may also come without a backward: whoever looks at a saved tensor of the graph sets it off.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1 or "target_frame_ref" in _hook()


def remember_call(site: object, call: Call | None, found: tuple[Any, ...]) -> None:
    """Keep what this forward call took from all ranks with the checkpointed region it runs in, if it runs in one."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        region = _hook().get("frame")
    elif torch.is_grad_enabled():
        return  # a reentrant region runs its forward without grad
    else:
        region = _reentrant_region()
    if region is not None:
        region.__dict__.setdefault(_MOMENTS, {}).setdefault(id(site), []).append(
            (None if call is None else call.number, found)
        )


def recall_call(site: object, call: Call | None) -> tuple[Any, ...] | None:
    """What the forward call found that this call recomputes, which then goes by its number; None where that is not certain."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        held = _hook()
        if "target_frame_ref" not in held or not _called_by_checkpoint():
            return None
        region, run = held["target_frame_ref"](), held["gid"]
    else:
        region, run = _reentrant_region(), torch._C._current_graph_task_id()
    kept = {} if region is None else region.__dict__.get(_MOMENTS, {})
    calls = kept.get(id(site), [])
    # Calls of one layer within one region are recomputed in their order, once per backward pass.
    turn = ("turn", run, id(site))
    index = kept.get(turn, 0)
    if index >= len(calls):
        return None
    kept[turn] = index + 1
    found: tuple[Any, ...]
    number, found = calls[index]
    if call is not None and number is not None:
        call.number = number
    return found


def is_selective() -> bool:
    """Whether selective checkpointing sees, and counts, the operations called here."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() > 0 and isinstance(_get_current_dispatch_mode(), _SELECTIVE)


def unseen_by_selective_checkpointing() -> AbstractContextManager[None]:
    """Within, selective checkpointing sees no operation.

    It pairs the n-th call of an operation in the forward with the n-th in the recompute, which makes fewer of ours.
    """
    if is_selective():
        return _pop_mode_temporarily()  # type: ignore[no-any-return, unused-ignore]
    return nullcontext()


def _hook() -> dict[str, Any]:
    """What the innermost saved-tensors hook closes over, if it is a checkpoint's; empty otherwise."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return {}
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    if getattr(pack, "__module__", None) != checkpoint.__name__:
        return {}
    return {
        name: cell.cell_contents for name, cell in zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True)
    }


def _called_by_checkpoint() -> bool:
    # A backward of its own within the region (a gradient penalty) may call the layer, too: that is no recompute.
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _reentrant_region() -> Any:
    """The context of the innermost reentrant region that runs, the same in its forward and in its recompute."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        if frame.f_code in _REENTRANT:
            return frame.f_locals["ctx"]
        frame = frame.f_back  # type: ignore[assignment]
    return None
