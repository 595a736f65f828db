"""Makes one rank misbehave at a chosen layer and call: what a training run must survive or report, on demand.

A fault is put into a model for the length of a ``with`` block and changes nothing else: the layer runs as it is on all other
calls and ranks, and has its own ``forward`` back afterwards. For eager models; a compiled one would be compiled anew.
"""

import difflib
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from syncnorm.testing._acts import ACTS, FaultInjected, Site

__all__ = ["FAULTS", "Fault", "FaultInjected", "Injected", "inject"]

Fault = Literal[
    "skip", "extra", "swap", "eval", "no_grad", "channels", "dtype", "bad_input", "empty", "nan", "drift", "raise",
    "stuck", "stop", "exit", "kill", "backward_order", "no_backward",
]  # fmt: skip

FAULTS: tuple[str, ...] = get_args(Fault)
"""Names of all faults."""

_OF_THE_BACKWARD = ("backward_order", "no_backward")

Forward = Callable[..., Any]


class Injected:
    """What has become of a fault on this rank.

    Attributes:
        calls: How often the layer has been called within the block; for faults of the backward, backward passes.
        at: When the fault struck, by ``time.monotonic()``, which processes of one machine share; None if it has not.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.at: float | None = None


@contextmanager
def inject(
    model: nn.Module,
    fault: Fault,
    *,
    layer: str = "",
    call: int = 1,
    rank: int | Collection[int] | None = None,
    other: str | None = None,
    seconds: float = 3600.0,
    on_strike: Callable[[], object] | None = None,
) -> Iterator[Injected]:
    """Let ``fault`` happen once within the block: at one call of one layer, on one rank.

    ======================  ==============================================================================================
    ``"skip"``              the layer is left out: its input is its output
    ``"extra"``             the layer runs twice
    ``"swap"``              the layer and ``other`` run in each other's place
    ``"eval"``              the layer, and all in it, runs in evaluation mode
    ``"no_grad"``           the layer runs under ``torch.no_grad()``
    ``"channels"``          the layer has one channel less than on other ranks, and passes the last one on
    ``"dtype"``             the input is float64 (float32 if it was), and the output cast back
    ``"bad_input"``         the input lacks its last channel
    ``"empty"``             the input has no samples
    ``"nan"``               the first value of the input is NaN
    ``"drift"``             the first floating-point buffer of the layer is off by one in its first value
    ``"raise"``             :class:`FaultInjected` is raised
    ``"stuck"``             the process sleeps for ``seconds``, outside of any exchange; a slow rank, if that is short
    ``"stop"``              the process is stopped (SIGSTOP), as a frozen machine is
    ``"exit"``              the process ends with code 3, without a word to its peers
    ``"kill"``              the process is killed (SIGKILL), as by the kernel when memory is short
    ``"backward_order"``    a backward pass runs after the next one: of two losses, the second first
    ``"no_backward"``       a backward pass does not run
    ======================  ==============================================================================================

    Args:
        model: The model, or one layer.
        fault: What happens.
        layer: Name of the layer in ``model.named_modules()``; the model itself by default.
        call: At which call of the layer within the block, from 1. For the two faults of the backward: at which call of
            ``Tensor.backward`` or ``torch.autograd.backward`` in this process.
        rank: On which rank or ranks, as ``torch.distributed.get_rank()`` says when it happens, 0 without a process group;
            None for whichever runs this.
        other: For ``"swap"``; by default the next layer of the same class and number of features.
        seconds: For ``"stuck"``.
        on_strike: Called the moment before, on the rank that it happens to; to note the time before a process ends, say.

    Yields:
        :class:`Injected`.

    Raises:
        ValueError: If there is no such fault, layer or call, or the fault needs what the layer has not.
        AssertionError: At the end of a block that ran without an exception, on a rank where the fault should have happened
            and did not: the layer was not called often enough, and a test that goes on would test nothing.

    Example:
        >>> from syncnorm.testing import inject
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with inject(model, "nan", layer="1", call=2):
        ...     outputs = [model(torch.randn(8, 3)) for _ in range(3)]
        >>> [bool(y.isfinite().all()) for y in outputs]
        [True, False, True]
    """
    target = _find(model, fault, layer, call)
    done = Injected()

    def strikes() -> bool:
        done.calls += 1
        if done.calls != call or not _is_here(rank):
            return False
        done.at = time.monotonic()
        if on_strike is not None:
            on_strike()
        return True

    if fault in _OF_THE_BACKWARD:
        with _backward(fault, strikes):
            yield done
    elif fault == "swap":
        partner = _partner(model, target, layer, other)
        first, second = target.forward, partner.forward
        turns = Injected()

        def swaps() -> bool:
            turns.calls += 1
            return turns.calls == call and _is_here(rank)

        with (
            _forward(target, lambda *a, **k: (second if strikes() else first)(*a, **k)),
            _forward(partner, lambda *a, **k: (first if swaps() else second)(*a, **k)),
        ):
            yield done
    else:
        act, run = ACTS[fault], target.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return act(Site(target, run, args, kwargs, seconds)) if strikes() else run(*args, **kwargs)

        with _forward(target, forward):
            yield done
    if done.at is None and _is_here(rank):
        raise AssertionError(
            f"the fault {fault!r} was to happen at call {call} of {layer or 'the model'!r} and did not: there were "
            f"{done.calls} calls within the block. Run more steps, or choose an earlier call."
        )


def _find(model: nn.Module, fault: str, layer: str, call: int) -> nn.Module:
    if fault not in FAULTS:
        close = difflib.get_close_matches(fault, FAULTS, 1)
        raise ValueError(f"there is no fault {fault!r}{f'; is {close[0]!r} meant?' if close else ''} Faults: {FAULTS}.")
    if call < 1:
        raise ValueError(f"calls are counted from 1, got call={call}.")
    if fault in _OF_THE_BACKWARD and layer:
        raise ValueError(f"{fault!r} happens to a backward pass of the whole model, got layer={layer!r}. Leave it out.")
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        close = difflib.get_close_matches(layer, modules, 3)
        raise ValueError(f"the model has no layer {layer!r}; close names: {close}. See model.named_modules().")
    found: nn.Module = modules[layer]
    if fault == "channels" and getattr(found, "num_features", 0) < 2:
        raise ValueError(
            f"'channels' needs a layer of 2 or more num_features, got {layer!r}, a {type(found).__name__}."
        )
    if fault == "drift" and not any(b.is_floating_point() for b in found.buffers()):
        raise ValueError(
            f"'drift' needs a layer with a floating-point buffer, got {layer!r}, a {type(found).__name__}."
        )
    return found


def _partner(model: nn.Module, target: nn.Module, layer: str, other: str | None) -> nn.Module:
    if other is not None:
        return _find(model, "swap", other, 1)
    modules: list[nn.Module] = list(model.modules())
    after = modules[modules.index(target) + 1 :]
    width = getattr(target, "num_features", None)
    for module in after + modules:
        if type(module) is type(target) and getattr(module, "num_features", None) == width and module is not target:
            return module
    raise ValueError(f"'swap' finds no other layer like {layer!r}, a {type(target).__name__}. Name one: other=...")


def _is_here(rank: int | Collection[int] | None) -> bool:
    mine = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return rank is None or mine == rank or (not isinstance(rank, int) and mine in rank)


@contextmanager
def _forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def _backward(fault: str, strikes: Callable[[], bool]) -> Iterator[None]:
    run, held = torch.autograd.backward, []

    def backward(*args: Any, **kwargs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # a checkpoint's own, inside of another
            run(*args, **kwargs)
            return
        if strikes():
            if fault == "backward_order":
                held.append((args, kwargs))
            return
        run(*args, **kwargs)
        if held:
            args, kwargs = held.pop()
            run(*args, **kwargs)

    torch.autograd.backward = backward
    try:
        yield
        if held:
            raise AssertionError("'backward_order' held a backward pass back for the next one, and none came.")
    finally:
        torch.autograd.backward = run
