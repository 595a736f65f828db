"""Our own C++ operators for CPU: one pass over memory each, one dispatcher call each.

Used once they are built (``python -m syncnorm build``); until then :func:`objection` says so and others serve. To
``torch.compile`` they are opaque, which on CPU is an advantage: Inductor's own batch norm is slower than eager.
"""

from collections.abc import Callable, Sequence
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from syncnorm.core.activation import ACTIVATIONS, Activation
from syncnorm.core.layout import count_per_channel
from syncnorm.core.moments import Moments
from syncnorm.core.traced import constant_while_traced
from syncnorm.kernels.native._build import build, compiler, library_path

__all__ = [
    "batch_backward",
    "batch_backward_input",
    "batch_backward_reduce",
    "batch_forward",
    "batch_moments",
    "batch_normalize",
    "build",
    "load",
    "objection",
    "serves_whole",
]

_CODES = {name: code for code, name in enumerate(ACTIVATIONS, 1)}
_MASKED = [_CODES[name] for name in ACTIVATIONS if Activation(name).is_piecewise_linear]
_GROUP = 16  # kGroup of batch.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_registering = RLock()  # fakes cannot be registered twice, and threads that meet in a cached function all run it


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
    with _registering:
        _register_fakes()
    return None


def batch_moments(x: Tensor) -> Moments:
    """Count, mean and M2 per channel of flat ``x``."""
    return Moments(float(count_per_channel(x)), *_ops().batch_moments.default(x))


def batch_normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``act((x - mean)·rstd·weight + bias + residual)``, subtracting first. A run of one channel has whole bytes of mask."""
    arguments = x, mean, rstd, weight, bias, *_code(activation), residual
    if residual is not None and activation is not None and activation.is_piecewise_linear:
        return _ops().batch_normalize_masked.default(*arguments)  # type: ignore[no-any-return]
    return _ops().batch_normalize.default(*arguments), None


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
    sums: Tensor = _ops().batch_backward_reduce.default(grad, x, mean, rstd, weight, bias, *_code(activation), side)
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
    arguments = grad, x, mean, rstd, weight, bias, means, *_code(activation), side
    if needs_residual and activation is not None:
        return _ops().batch_backward_input_and_residual.default(*arguments)  # type: ignore[no-any-return]
    return _ops().batch_backward_input.default(*arguments), None


def serves_whole(x: Tensor) -> bool:
    """Whether the calls below take ``x``: operators take whatever the primitives do."""
    return True


def batch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    residual: Tensor | None,
    chunks: Sequence[int] = (),
) -> tuple[Tensor, Moments, Tensor, Tensor | None]:
    """y, moments, 1/std and mask of a group of one: channel by channel where they fit a cache, so x is read once."""
    out = _ops().batch_forward.default(x, weight, bias, eps, *_code(activation), residual, chunks)
    y, mean, m2, rstd, mask = out
    count: Tensor | float = float(count_per_channel(x))
    if chunks:
        count = torch.tensor(chunks, dtype=torch.float64) * (count / x.size(0))
    return y, Moments(count, mean, m2), rstd, mask if mask.numel() else None


def batch_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    side: Tensor | None,
    needs_residual: bool,
    chunks: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of the residual (None where it is ``grad``), of bias and of weight, for a group of one."""
    needs_residual = needs_residual and activation is not None
    code = _code(activation)
    out = _ops().batch_backward.default(grad, x, mean, rstd, weight, bias, *code, side, needs_residual, chunks)
    dx, dresidual, dbias, dweight = out
    return dx, dresidual if needs_residual else None, dbias, dweight


def _ops() -> Any:
    # Callers name the overload, too: a packet looks for it at every call.
    return torch.ops.syncnorm


def _code(activation: Activation | None) -> tuple[int, float]:
    """An activation in the arguments of the operators."""
    if activation is None:
        return 0, 0.0
    return _CODES[activation.name], activation.negative_slope


@cache  # once in a process, also where the library is loaded again
def _register_fakes() -> None:
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.size(1), dtype=torch.float64), x.new_empty(x.size(1), dtype=torch.float64)

    def sums(*arguments: Any) -> Tensor:
        x: Tensor = arguments[0]
        return x.new_empty(2, x.size(1), dtype=torch.float64)

    def like(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def masked(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        # Runs of one channel have whole bytes, all else is one row of bits.
        runs = x.dim() == 3 and x.size(2) >= _GROUP
        mask_bytes = x.size(0) * x.size(1) * (-(-x.size(2) // 8)) if runs else -(-x.numel() // 8)
        return torch.empty_like(x), x.new_empty(mask_bytes, dtype=torch.uint8)

    def forward(
        x: Tensor,
        weight: Any,
        bias: Any,
        eps: float,
        activation: int,
        slope: float,
        residual: Tensor | None,
        chunks: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        y, mask = masked(x) if residual is not None and activation in _MASKED else (like(x), x.new_empty(0).byte())
        shape = (len(chunks), x.size(1)) if chunks else (x.size(1),)
        return y, *(x.new_empty(shape, dtype=torch.float64) for _ in range(3)), mask

    def backward(
        grad: Tensor, x: Tensor, mean: Any, rstd: Any, weight: Tensor | None, bias: Any, activation: int, slope: float,
        side: Any, needs_residual: bool, chunks: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        vectors = (x.new_empty(x.size(1), dtype=torch.float64 if weight is None else weight.dtype) for _ in range(2))
        return like(x), like(x) if needs_residual else x.new_empty(0), *vectors

    def both(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    fakes: dict[str, Callable[..., Any]] = {
        "batch_moments": moments,
        "batch_normalize": like,
        "batch_normalize_masked": masked,
        "batch_backward_reduce": sums,
        "batch_backward_input": like,
        "batch_backward_input_and_residual": both,
        "batch_forward": forward,
        "batch_backward": backward,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"syncnorm::{name}", fake)
