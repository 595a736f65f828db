"""Tier: no process. The triton kernels compiled ahead of time for GPUs that are not here: PTX, registers, and what traces."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from syncnorm.core.activation import Activation  # noqa: E402
from syncnorm.core.moments import Moments  # noqa: E402
from syncnorm.kernels import triton as kernels  # noqa: E402
from syncnorm.kernels.triton import _batch, _rows, _whole, among  # noqa: E402
from syncnorm.kernels.triton import rows as row_kernels  # noqa: E402

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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Primitives on meta tensors plan as for an H100, and what they launch is written here."""
    out: list[Launch] = []

    def record(
        kernel: Any, programs: int, *arguments: Any, warps: int = 4, registers: int | None = None, **constants: Any
    ) -> None:
        out.append(Launch(kernel, programs, arguments, warps, registers, constants))

    monkeypatch.setattr(_batch, "launch", record)
    monkeypatch.setattr(_rows, "launch", record)
    monkeypatch.setattr(_whole, "launch", record)
    return out


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


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "batch NCHW": lambda dtype: batch_primitives(dtype, False),
    "batch NHWC": lambda dtype: batch_primitives(dtype, True),
    "batch among ranks": among_ranks,
    "layer 1024": lambda dtype: row_primitives(dtype, 1024, True),
    "rms 8192": lambda dtype: row_primitives(dtype, 8192, False),
    "layer 8192": lambda dtype: row_primitives(dtype, 8192, True),
    "layer 32768": lambda dtype: row_primitives(dtype, 32768, True),
    "group NCHW": lambda dtype: group_primitives(dtype, False),
    "group NHWC": lambda dtype: group_primitives(dtype, True),
}


def check_machine_code(launch: Launch, capability: int) -> None:
    """No spills, and whatever is as large as the input moves 16 bytes (or more) at a time."""
    binary = compiled(launch, capability)
    ptx, used = binary.asm["ptx"], resources(binary)
    assert used["STACK"] == used["LOCAL"] == 0 and ".local" not in ptx, (launch.kernel.__name__, used)
    if "ALIGN" not in launch.constants:
        return  # it adds partial results
    if launch.constants.get("STAGES", 1) > 1:
        assert "cp.async" in ptx, (launch.kernel.__name__, "fetches nothing ahead")
    wide = {"ld": 0, "st": 0}
    for kind, suffixes in re.findall(r"\b(ld|st)\.global((?:\.\w+)+)", ptx):
        vector = re.search(r"\.v(\d)", suffixes)
        width = int(vector[1] if vector else 1) * int(re.findall(r"\.b(\d+)", suffixes)[-1]) // 8
        assert width != 2, (launch.kernel.__name__, "moves single values of half precision")
        wide[kind] += width if width >= 16 else 0
    wide["ld"] += 16 * len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10\b", ptx))
    tensors = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    size = tensors["x" if "x" in tensors else "h"].numel()
    large = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.numel() == size}
    written = {"y", "dx", "dresidual"} | ({"h"} if "y" in tensors else set())
    tile = launch.constants["ROWS"] * launch.constants["COLS"] // (32 * launch.warps)
    for kind, names in (("ld", large.keys() - written), ("st", large.keys() & written)):
        least = sum(tile * large[name].element_size() for name in names)
        assert wide[kind] >= least, (launch.kernel.__name__, kind, wide, least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_for_hopper_move_16_bytes_at_a_time_and_spill_nothing(
    case: str, dtype: torch.dtype, launches: list[Launch]
) -> None:
    CASES[case](dtype)
    assert launches
    for launch in launches:
        check_machine_code(launch, 90)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("case", ["batch NHWC", "layer 1024"])
def test_kernels_for_ampere_and_blackwell(case: str, capability: int, launches: list[Launch]) -> None:
    CASES[case](torch.bfloat16)
    for launch in launches:
        check_machine_code(launch, capability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("features", [128, 1024, 2048, 4096, 8192])
def test_programs_that_share_the_rows_of_a_backward_run_at_once(
    features: int, dtype: torch.dtype, launches: list[Launch]
) -> None:
    """Or those left over would begin when the others have ended: registers and shared memory are an H100's."""
    row_primitives(dtype, features, True)
    (launch,) = [launch for launch in launches if launch.kernel.__name__ == "row_backward_kernel"]
    binary, at_once = compiled(launch, 90), launch.programs / 132
    used = resources(binary)
    assert used["STACK"] == used["LOCAL"] == 0
    assert -(-used["REG"] // 8) * 8 * 32 * launch.warps * at_once <= 65536
    assert (binary.metadata.shared + 1024) * at_once <= 228 << 10
