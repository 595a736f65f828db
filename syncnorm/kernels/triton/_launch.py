"""How a kernel is started, and where its outputs come from. Tests put their own functions in place of both."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import wrap_triton
from torch.nn import Parameter
from triton import JITFunction

__all__ = ["dense", "empty", "is_plain", "launch"]


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for an output. Every element is written by a kernel."""
    return torch.empty(shape, dtype=dtype, device=device)


def dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """The vectors, each without gaps."""
    return [None if v is None else v.contiguous() for v in vectors]


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is memory and not a stand-in, of which tracing and subclasses make use."""
    return type(x) is Tensor or type(x) is Parameter


def launch(
    kernel: Any,
    programs: int,
    first: Tensor,
    *arguments: Any,
    warps: int = 4,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Run ``programs`` instances of ``kernel`` on the device of ``first``; while something traces, record that instead.

    ``registers`` is the most that a thread may use, where the compiler can be told (it changes no result).
    """
    if not is_plain(first):
        if isinstance(kernel, JITFunction) or not isinstance(first, FakeTensor):
            wrap_triton(kernel)[(programs,)](first, *arguments, num_warps=warps, **constants)
        return
    # Said, because triton 3.9 warns where it is not; what two kernels must round alike does not depend on it.
    constants |= {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and not torch.version.hip:
        constants["maxnreg"] = registers
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[(programs,)](first, *arguments, **constants)
    else:
        kernel[(programs,)](first, *arguments, **constants)
