"""Tier: no process. Who the triton kernels serve, and how they look to a compiler: no GPU is needed to trace them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from syncnorm.core.activation import Activation
from syncnorm.core.traced import constant_while_traced
from syncnorm.kernels import BACKENDS, choose
from syncnorm.kernels import triton as kernels
from syncnorm.kernels.rows import choose_rows
from syncnorm.kernels.triton import rows as row_kernels
from syncnorm.kernels.triton._plan import plan_walk


def test_objections_name_the_device_the_dtype_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run on CUDA, the input is on cpu" in str(kernels.objection(torch.empty(2, 3, 4)))
    assert "run on CUDA, the input is on meta" in str(kernels.objection(torch.empty(2, 3, 4, device="meta")))
    assert "the input is torch.complex64" in str(kernels.objection(torch.empty(2, 3, 4, dtype=torch.complex64)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._installation_objection.cache_clear()
    try:
        assert "triton is not installed; on Linux `pip install triton`" in str(kernels.objection(torch.empty(2, 3)))
    finally:
        kernels._installation_objection.cache_clear()


@pytest.mark.parametrize(
    ("versions", "serves"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.6"}, False),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, True),
        ({"triton": "3.7.1", "numpy": "2.5.2"}, True),
    ],
    ids=str,
)
def test_an_interpreter_that_cannot_count_is_no_interpreter(
    versions: dict[str, str], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "version", versions.__getitem__)
    caches = (kernels._installation_objection, kernels._interpreter_objection)
    try:
        for cache in caches:
            cache.cache_clear()
        said = kernels.objection(torch.empty(2, 3))
    finally:
        for cache in caches:
            cache.cache_clear()
    reason = "the interpreter of triton 3.6.0 cannot count a loop with numpy 2.4.6: it needs triton>=3.7 or numpy<2.4."
    assert said == (None if serves else reason)


def test_asked_for_by_name_where_it_cannot_run() -> None:
    x = torch.randn(2, 3, 4)
    for pick in (choose, choose_rows):
        with pytest.raises(RuntimeError, match=r"backend='triton' was asked for and cannot run: .* Use backend='auto'"):
            pick("triton", x)


def test_an_image_without_a_compiler_is_served_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.runtime", reason="triton is not installed (the extra `triton`)").driver

    class Driver:
        def get_current_target(self) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    caches = (kernels._capability_objection, kernels._driver_objection)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "_active", Driver())
    try:
        for cache in caches:
            cache.cache_clear()
        said = str(kernels._device_objection("cuda", 0))
        assert "does not start here (RuntimeError: Failed to find C compiler. Please specify via CC" in said
        assert "needs a C compiler and Python's headers" in said
        kernels._driver_objection.cache_clear()
        monkeypatch.setattr(Driver, "get_current_target", lambda self: "cuda:90")
        assert kernels._device_objection("cuda", 0) is None
    finally:
        for cache in caches:
            cache.cache_clear()


def test_rows_leave_transforms_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_interpreter_objection", lambda: None)  # no kernel runs
    said = []
    x = torch.randn(2, 3)
    torch.func.grad(lambda x: said.append(row_kernels.objection(x)) or x.sum())(x)
    torch.func.jvp(lambda x: said.append(row_kernels.objection(x)) or x, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        said.append(row_kernels.objection(x))
    assert row_kernels.objection(x) is None
    assert said == ["torch.func's transforms do not see into the triton kernels."] * 2 + [
        "the triton kernels have no forward-mode derivative."
    ]


def test_auto_passes_the_interpreter_by(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_interpreter_objection", lambda: None)  # no kernel runs
    x = torch.randn(2, 3, 4)
    assert choose("triton", x) is BACKENDS["triton"]
    assert choose("auto", x) is not BACKENDS["triton"] is not choose_rows("auto", x)


def test_constants_are_marked_for_the_compiler_as_torch_marks_them() -> None:
    marks = [vars(mark(lambda: 0)) for mark in (torch.compiler.assume_constant_result, constant_while_traced)]
    assert marks[0] == marks[1] != {}


TRACE = """
import torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from functorch.compile import aot_function, make_boxed_func
from syncnorm.core.activation import Activation
from syncnorm.kernels import triton as kernels
from syncnorm.kernels.triton import rows as row_kernels
from syncnorm.kernels.triton._plan import plan_walk

class Driver:  # Inductor asks the kernels' code for a GPU what they write to; none need be there
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)

triton.runtime.driver.set_active(Driver())

def step(x, g, stats, w, means):
    count, mean, m2 = kernels.batch_moments(x)
    y, mask = kernels.batch_normalize(x, stats, stats, w, w, Activation("relu"), g)
    sums = kernels.batch_backward_reduce(g, x, stats, stats, w, w, Activation("relu"), mask)
    dx, dr = kernels.batch_backward_input(g, x, stats, stats, w, means, w, Activation("relu"), mask, True)
    z, h, mean_r, rstd = row_kernels.row_norm_forward(x[0], None, None, 1e-5, True, g[0])
    dz, dw, db = row_kernels.row_norm_backward(g[0], h, None, mean_r, rstd, True, True)
    u, mean_g, rstd_g = row_kernels.group_norm_forward(x, 4, w, w, 1e-5)
    du, *_ = row_kernels.group_norm_backward(g, x, 4, w, w, mean_g, rstd_g)
    return mean, m2, y, mask, sums, dx, dr, z, dz, dw, db, u, du

written = []
def look(graph, _):
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in node.name and "tensors_to_clone" in node.kwargs:
            written.append(sorted(node.kwargs["tensors_to_clone"]))
    return make_boxed_func(graph.forward)

with FakeTensorMode():
    x, stats, w = torch.empty(8, 64, 3136), torch.empty(64, dtype=torch.float64), torch.empty(64)
    out = aot_function(step, fw_compiler=look)(x, x, stats, w, torch.empty(2, 64, dtype=torch.float64))
    print([list(t.shape) for t in out])
print(written)
"""


def test_operators_trace_into_one_graph_that_knows_what_each_kernel_writes() -> None:
    pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")
    outcome = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=110, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    shapes, written = outcome.stdout.splitlines()
    assert shapes == str(
        [[64], [64], [8, 64, 3136], [512, 392], [2, 64], [8, 64, 3136], [8, 64, 3136], [64, 3136], [64, 3136], [3136], [3136],
         [8, 64, 3136], [8, 64, 3136]]
    )  # fmt: skip
    assert written == str(
        [["partial"], ["mean", "spread_out"], ["bits", "y"], ["partial"], ["dresidual", "dx"],
         ["h", "mean", "rstd", "y"], ["dbias", "dweight", "dx"], ["out"], ["out"],
         ["partial"], ["mean", "spread_out"], ["y"], ["partial"], ["dx"]]
    )  # fmt: skip


def test_fake_tensors_pass_without_a_kernel() -> None:
    pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")
    with FakeTensorMode():
        x, affine = torch.empty(4, 6, 10), torch.empty(6)
        found: list[Any] = [*row_kernels.group_norm_forward(x, 3, affine, affine, 1e-5, Activation("silu"))]
        found += kernels.batch_backward_input(x, x, affine, affine, None, torch.empty(2, 6))
    assert [None if t is None else tuple(t.shape) for t in found] == [(4, 6, 10), (4, 3), (4, 3), (4, 6, 10), None]
    assert all(isinstance(t, Tensor) for t in found[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16384, 1024), (3, 4096, 49), (64, 64, 49), (64, 256, 3136), (200704, 256)])
def test_no_program_walks_past_the_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    for tensors, reduces in ((1, True), (2, True), (2, False)):
        walk = plan_walk(x, tensors=tensors, reduces=reduces)
        assert walk.steps <= walk.tiles and walk.splits <= walk.tiles
        values = walk.tiles * walk.rows * walk.cols * walk.blocks
        assert values >= x.numel()  # all of them are walked
