"""Compiles the triton kernels for GPUs that are not here: what primitives would launch, and the machine code of that."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.kernels import triton as kernels
from syncnorm.kernels.triton import _batch, _rows, _whole, among
from syncnorm.kernels.triton import rows as row_kernels

NAMES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
    torch.int64: "*i64",
}  # fmt: skip
RELU, GELU = Activation("relu"), Activation("gelu")


class Launch(NamedTuple):
    """What a primitive would have started."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    warps: int
    registers: int | None
    constants: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Primitives on meta tensors plan as for an H100, and what they launch is written here."""
    out: list[Launch] = []

    def record(
        kernel: Any, programs: int, *arguments: Any, warps: int = 4, registers: int | None = None, **constants: Any
    ) -> None:
        out.append(Launch(kernel, programs, arguments, warps, registers, constants))

    with ExitStack() as stack:
        for module in (_batch, _rows, _whole, among):
            stack.enter_context(patch.object(module, "launch", record))
        yield out


def compiled(launch: Launch, capability: int) -> Any:
    """The launch's kernel as triton would compile it at the first call, for a GPU of that capability."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(i,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True, "maxnreg": launch.registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary: Any) -> dict[str, int]:
    """Registers, stack and local memory a thread, as CUDA's own tool reads them from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout + said.stderr)}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def batch_primitives(dtype: torch.dtype, channels_last: bool, n: int = 64, c: int = 256, s: int = 3136) -> None:
    x = meta(n * s, c, dtype=dtype) if channels_last else meta(n, c, s, dtype=dtype)
    stats, affine, means = meta(c, dtype=torch.float64), meta(c), meta(2, c, dtype=torch.float64)
    kernels.batch_moments(x)
    kernels.batch_normalize(x, stats, stats, affine, affine, RELU)
    _, mask = kernels.batch_normalize(x, stats, stats, affine, affine, RELU, x)
    for activation, side in ((RELU, None), (RELU, mask), (GELU, x)):
        kernels.batch_backward_reduce(x, x, stats, stats, affine, affine, activation, side)
        kernels.batch_backward_input(x, x, stats, stats, affine, means, affine, activation, side, side is not None)


def among_ranks(dtype: torch.dtype, n: int = 64, c: int = 256, s: int = 3136) -> None:
    x, affine, words = meta(n, c, s, dtype=dtype), meta(c), (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    row = among.batch_forward_row(x, 4096, words)
    _, moments, rstd, mask, _ = among.batch_forward_rest(row, 6, x, affine, affine, 1e-5, RELU, x)
    arguments = (x, x, moments.mean, rstd, affine, affine, RELU, mask)
    row, _, _ = among.batch_backward_row(*arguments, 4096, words)
    among.batch_backward_rest(row, 6, moments.count, *arguments, True)
    for momentum in (0.1, None):
        kernels.move_running(moments, affine, affine, meta(1, dtype=torch.int64), momentum)
    _, alone, rstd, _ = kernels.batch_forward(x, affine, affine, 1e-5, RELU, None)
    kernels.batch_backward(x, x, alone.mean, rstd, affine, affine, RELU, None, False)
    kernels.move_running(Moments(8.0, alone.mean, alone.m2), affine, affine, None, 0.1)


def row_primitives(dtype: torch.dtype, features: int, centre: bool) -> None:
    x, affine = meta(4096, features, dtype=dtype), meta(features)
    _, h, mean, rstd = row_kernels.row_norm_forward(x, affine, affine, 1e-5, centre, x)
    assert h is not None
    row_kernels.row_norm_backward(x, h, affine, mean, rstd, True, centre, x)


def group_primitives(dtype: torch.dtype, channels_last: bool) -> None:
    x = meta(32, 1024, 320, dtype=dtype).transpose(1, 2) if channels_last else meta(32, 320, 1024, dtype=dtype)
    affine = meta(320)
    _, mean, rstd = row_kernels.group_norm_forward(x, 32, affine, affine, 1e-5, Activation("silu"))
    row_kernels.group_norm_backward(x, x, 32, affine, affine, mean, rstd, Activation("silu"))
