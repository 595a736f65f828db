"""What a function says to a compiler that traces it, and whether somebody transforms it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["constant_while_traced", "is_exporting", "is_transformed", "not_recomputed"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_traced(function: _Function) -> _Function:
    """Let Dynamo call ``function`` and write its result into the graph, as ``torch.compiler.assume_constant_result`` does.

    That one imports all of Dynamo, and with it triton where it is installed: a second, at the import of whoever decorates.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which Dynamo of torch 2.11 takes for always true."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def is_transformed() -> bool:
    """Whether torch.func, a forward-mode derivative or ``torch.jit.trace`` must see every operation called here."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or bool(torch.jit.is_tracing())


def not_recomputed(value: Tensor) -> Tensor:
    """``value``; inside ``torch.compile`` in a form that the backward graph keeps instead of computing it again.

    AOTAutograd (torch 2.13) forms again in the backward what was cheap in the forward, also from buffers that the forward
    has moved in place since: in ``y = x·(2·buf); buf.add_(1)`` the gradient is 2·(buf + 1). It never does so with a
    reduction.
    """
    if not torch.compiler.is_compiling():
        return value
    return torch.stack([value, torch.zeros_like(value)]).sum(0)
