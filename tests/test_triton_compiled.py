"""Tier: no process. The triton kernels compiled ahead of time for GPUs that are not here: PTX, registers, and what traces."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.triton_ahead import (
    Launch,
    among_ranks,
    batch_primitives,
    compiled,
    group_primitives,
    recorded,
    resources,
    row_primitives,
)


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    with recorded() as out:
        yield out


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


class _Hopper:
    """Stands for triton's driver where no GPU is: enough of it to compile what a call would start."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("case", CASES)
def test_triton_takes_every_call_as_it_is_made(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, their types and options go through triton's own entrance, up to the launch itself."""
    started, run = [], JITFunction.run

    def compiled_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        started.append(self.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compiled_only)
    monkeypatch.setattr(driver, "_active", _Hopper())
    CASES[case](torch.bfloat16)
    assert started
