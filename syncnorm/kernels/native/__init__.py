"""Our own C++ operators for CPU: one pass over memory each, one dispatcher call each.

Used once they are built (``python -m syncnorm build``); until then :func:`objection` says so and others serve. To
``torch.compile`` they are opaque, which on CPU is an advantage: Inductor's own batch norm is slower than eager.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.layout import count_per_channel
from syncnorm.core.moments import Moments
from syncnorm.core.traced import constant_while_traced
from syncnorm.kernels import reference
from syncnorm.kernels.native._build import build, compiler, library_path

__all__ = [
    "batch_backward_input",
    "batch_backward_reduce",
    "batch_moments",
    "batch_normalize",
    "build",
    "load",
    "objection",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def objection(x: Tensor) -> str | None:
    """Why these operators cannot serve ``x``."""
    if x.device.type != "cpu":
        return f"the native operators run on CPU, the input is on {x.device}."
    if x.dtype not in _DTYPES:
        return f"the native operators know {[str(d).removeprefix('torch.') for d in _DTYPES]}, the input is {x.dtype}."
    reason: str | None = load()
    return reason


@constant_while_traced
def load() -> str | None:
    """Load the operators if they are built; otherwise why they cannot be."""
    return _load()


@cache
def _load() -> str | None:
    path = library_path()
    if not path.exists():
        how = (
            "run `python -m syncnorm build`"
            if compiler()
            else "no C++ compiler was found; install one, then run `python -m syncnorm build`"
        )
        return f"the native operators are not built for this torch and processor; {how}."
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native operators did not load ({error}); run `python -m syncnorm build --force`."
    _register_fakes()
    return None


def batch_moments(x: Tensor) -> Moments:
    """Count, mean and M2 per channel of flat ``x``."""
    mean, m2 = torch.ops.syncnorm.batch_moments(x).unbind(0)
    return Moments(float(count_per_channel(x)), mean, m2)


def batch_normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``act((x - mean)·rstd·weight + bias + residual)``, subtracting first."""
    if activation is not None or residual is not None:
        return reference.batch_normalize(x, mean, rstd, weight, bias, activation, residual)
    return torch.ops.syncnorm.batch_normalize(x, mean, rstd, weight, bias), None


def batch_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    side: Tensor | None = None,
) -> Tensor:
    """Σg' and Σg'·x̂, float64 ``[2, C]``."""
    if activation is not None:
        return reference.batch_backward_reduce(grad, x, mean, rstd, weight, bias, activation, side)
    sums: Tensor = torch.ops.syncnorm.batch_backward_reduce(grad, x, mean, rstd)
    return sums


def batch_backward_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    means: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    side: Tensor | None = None,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``rstd·weight·(g' - ⟨g'⟩ - x̂⟨g'·x̂⟩)``, and g' for the residual."""
    if activation is not None:
        return reference.batch_backward_input(
            grad, x, mean, rstd, weight, means, bias, activation, side, needs_residual
        )
    return torch.ops.syncnorm.batch_backward_input(grad, x, mean, rstd, weight, means), None


def _register_fakes() -> None:
    def sums(*tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(2, tensors[0].size(1), dtype=torch.float64)

    def first(x: Tensor, *_: Tensor | None) -> Tensor:
        return torch.empty_like(x)

    def second(_: Tensor, x: Tensor, *__: Tensor | None) -> Tensor:
        return torch.empty_like(x)

    fakes: dict[str, Callable[..., Any]] = {
        "batch_moments": sums,
        "batch_backward_reduce": sums,
        "batch_normalize": first,
        "batch_backward_input": second,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"syncnorm::{name}", fake)
