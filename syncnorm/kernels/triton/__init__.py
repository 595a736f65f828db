"""Triton kernels for CUDA: each primitive reads and writes every tensor once, in 16-byte accesses.

Reductions are split so that few channels or few values fill the device too, and their parts are added in a fixed order:
the same input on the same kind of device gives the same bits. Triton itself is imported by the first call.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.layout import count_per_channel
from syncnorm.core.moments import Moments
from syncnorm.core.traced import constant_while_traced

__all__ = [
    "batch_backward",
    "batch_backward_input",
    "batch_backward_reduce",
    "batch_forward",
    "batch_moments",
    "batch_normalize",
    "found",
    "move_running",
    "objection",
    "primitives",
    "serves_whole",
    "spelled",
    "stands_back",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def objection(x: Tensor) -> str | None:
    """Why these kernels cannot serve ``x``.

    Asked for by name they also run inside ``torch.compile``, without a graph break; tiles are constants there, so that each
    new shape is compiled anew, of which Dynamo allows eight. ``"auto"`` takes any shape.
    """
    if x.dtype not in _DTYPES:
        return f"the triton kernels know {[str(d).removeprefix('torch.') for d in _DTYPES]}, the input is {x.dtype}."
    if x.device.type not in ("cuda", "cpu"):
        return f"the triton kernels run on CUDA, the input is on {x.device}."
    reason: str | None = _device_objection(x.device.type, x.device.index or 0)
    return reason


def stands_back(x: Tensor) -> bool:
    """Whether "auto" passes these kernels by.

    Inside ``torch.compile``, as Inductor calls them but fuses nothing into them, which the traceable reference lets it do;
    and where they are interpreted, which is for tests.
    """
    return x.device.type == "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing()


@constant_while_traced
def _device_objection(kind: str, index: int) -> str | None:
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the triton kernels run on CUDA, the input is on cpu (TRITON_INTERPRET=1 in the environment interprets them)."
    if kind == "cpu":
        return _installation_objection() or _interpreter_objection()
    return _installation_objection() or _capability_objection(index) or _driver_objection()


@cache
def _installation_objection() -> str | None:
    return None if find_spec("triton") else "triton is not installed; on Linux `pip install triton` brings it."


@cache
def _interpreter_objection() -> str | None:
    try:
        triton, numpy = version("triton"), version("numpy")
    except PackageNotFoundError:
        return None
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton} cannot count a loop with numpy {numpy}: it needs triton>=3.7 or numpy<2.4."
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@cache
def _capability_objection(index: int) -> str | None:
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    least = "the triton kernels need compute capability 8.0 (Ampere) or newer"
    return None if major >= 8 else f"{least}, device {index} has {major}.{minor}."


@cache
def _driver_objection() -> str | None:
    """Triton compiles some C for itself where it first meets a device, and images that only run programs cannot."""
    import triton
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of a compiler, a linker, a header, a driver
        said = " ".join(str(error).split())[:200]
        return (
            f"triton {triton.__version__} does not start here ({type(error).__name__}: {said}). It needs a C compiler and "
            "Python's headers (on Debian, gcc and python3-dev) and the library of the CUDA driver."
        )
    return None


def batch_moments(x: Tensor) -> Moments:
    """Count, mean and M2 per channel of flat ``x``."""
    mean, m2 = primitives(x).moments(x)
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
    """``act((x - mean)·rstd·weight + bias + residual)``, and the mask: innermost dim packed, each row from a new byte."""
    y, bits = primitives(x).normalize(x, mean, rstd, weight, bias, *spelled(activation), residual)
    return y, found(bits)


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
    sums: Tensor = primitives(x).backward_reduce(grad, x, mean, rstd, weight, bias, *spelled(activation), side)
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
    dx, dresidual = primitives(x).backward_input(
        grad, x, mean, rstd, weight, means, bias, *spelled(activation), side, needs_residual
    )  # fmt: skip
    return dx, found(dresidual)


def serves_whole(x: Tensor) -> bool:
    """Whether the calls below take ``x``: memory, and nothing that stands for it while something traces."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def batch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    residual: Tensor | None,
    chunks: Sequence[int] = (),
) -> tuple[Tensor, Moments, Tensor, Tensor | None]:
    """y, moments, ``1/√(var + eps)`` and mask: three kernels, or as many for each chunk."""
    from syncnorm.kernels.triton import _whole

    return _whole.forward(x, weight, bias, eps, *spelled(activation), residual, chunks)


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
    """Gradients of x, residual, bias and weight: three kernels, or as many for each chunk."""
    from syncnorm.kernels.triton import _whole

    return _whole.backward(
        grad, x, mean, rstd, weight, bias, *spelled(activation), side, needs_residual, chunks
    )  # fmt: skip


def move_running(moments: Moments, mean: Tensor, var: Tensor, counter: Tensor | None, momentum: float | None) -> None:
    """Running statistics ``[C]`` and their counter, in place: one kernel."""
    from syncnorm.kernels.triton import _whole

    _whole.move_running(moments, mean, var, counter, momentum)
    torch.autograd.graph.increment_version([mean, var] if counter is None else [mean, var, counter])


def primitives(x: Tensor) -> Any:
    """The functions themselves, or operators of the same names for whoever traces."""
    from syncnorm.kernels.triton import _launch, _ops

    return torch.ops.syncnorm_triton if torch.compiler.is_compiling() or not _launch.is_plain(x) else _ops


def spelled(activation: Activation | None) -> tuple[str, float]:
    """An activation as an operator takes it."""
    return ("", 0.0) if activation is None else (activation.name, activation.negative_slope)


def found(output: Tensor) -> Tensor | None:
    """An output of an operator, or None where there was none."""
    return output if output.numel() else None
