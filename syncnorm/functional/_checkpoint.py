"""Recognises activation checkpointing, so that a recomputed layer neither counts a batch twice nor meets its ranks again.

A recompute is tied to its forward by the checkpointed region itself (the frame object of ``use_reentrant=False``, the
autograd context of ``use_reentrant=True``), never by comparing values: what one rank recognises, all do. Where a region
is not recognised, the statistics are still updated once and the exchange is simply made again.

The private hooks of torch that this needs live in this file alone; ``tests/test_checkpoint.py`` fails if they go.
"""

import inspect
import sys
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from syncnorm.core.moments import Moments

__all__ = ["is_recomputing", "recall", "remember"]

_MOMENTS = "_syncnorm_moments"


def is_recomputing() -> bool:
    """Whether this call runs inside the backward pass, as the recompute of a checkpointed forward does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def remember(site: object, moments: Moments) -> None:
    """Keep the global moments of this forward call with the checkpointed region it runs in, if it runs in one."""
    region = _region()
    if region is not None:
        region.__dict__.setdefault(_MOMENTS, {}).setdefault(id(site), []).append(moments)


def recall(site: object) -> Moments | None:
    """The global moments of the forward call that this call recomputes; None where that is not certain."""
    region = _region()
    if region is None:
        return None
    kept = region.__dict__.get(_MOMENTS, {})
    calls = kept.get(id(site), [])
    # Calls of one layer within one region are recomputed in their order, once per backward pass.
    turn = ("turn", torch._C._current_graph_task_id(), id(site))
    index = kept.get(turn, 0)
    if index >= len(calls):
        return None
    kept[turn] = index + 1
    moments: Moments = calls[index]
    return moments


def _region() -> Any:
    """The innermost checkpointed region around the caller, the same object in its forward and in its recompute."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
        if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
            return None
        held = inspect.getclosurevars(pack).nonlocals
        return held["frame"] if "frame" in held else held["target_frame_ref"]()
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
        return None  # neither the forward of a reentrant region (no grad) nor its recompute (inside backward)
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in (CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__):
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None
