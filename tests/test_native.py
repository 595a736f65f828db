"""Tier: no process. The native operators: built on request into a cache, opaque to the compiler, explained when missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncnorm.errors import SyncNormError
from syncnorm.kernels import native
from syncnorm.kernels.native import _build

RELU, GELU = 1, 4  # the operators' codes for them

needs_compiler = pytest.mark.skipif(_build.compiler() is None, reason="no C++ compiler on this machine")


@needs_compiler
def test_build_once_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.build()  # the usual cache: a second later call finds it
    assert native.build() == _build.library_path() and _build.library_path().exists()
    monkeypatch.setenv("SYNCNORM_CACHE", str(tmp_path))
    assert _build.library_path().is_relative_to(tmp_path)
    assert not _build.library_path().exists()


@needs_compiler
def test_a_failed_build_shows_the_compilers_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cpp").write_text("int main() { return this_name_is_unknown; }\n")
    monkeypatch.setenv("SYNCNORM_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "_FOLDER", tmp_path)
    with pytest.raises(
        SyncNormError, match=r"(?s)building the native backend failed \(exit code 1\):.*this_name_is_unknown"
    ):
        native.build()
    assert not _build.library_path().exists()


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCNORM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SyncNormError, match=r"needs a C\+\+ compiler and none was found\. Install g\+\+ or set CXX"):
        native.build()
    native._load.cache_clear()
    try:
        reason = native.objection(torch.empty(2, 3, 4))
        assert reason is not None
        assert "not built for this torch and processor; no C++ compiler was found" in reason
    finally:
        native._load.cache_clear()


def test_objections_name_the_device_and_the_dtype() -> None:
    assert "the input is on meta" in str(native.objection(torch.empty(2, 3, 4, device="meta")))
    assert "the input is torch.complex64" in str(native.objection(torch.empty(2, 3, 4, dtype=torch.complex64)))


@needs_compiler
def test_operators_pass_torchs_own_checks() -> None:
    load()
    ops = torch.ops.syncnorm
    vector = torch.rand(3, dtype=torch.float64) + 0.5
    means = torch.rand(2, 3, dtype=torch.float64)
    # Runs, short rows, and rows across the channels that share the bytes of a mask.
    for x in (torch.randn(2, 3, 17), torch.randn(5, 3, 5), torch.randn(13, 3, dtype=torch.bfloat16)):
        g = torch.randn_like(x)
        affine = vector, vector, torch.ones(3), None
        mask = ops.batch_normalize_masked(x, *affine, RELU, 0.0, g)[1]
        assert mask.numel() * 8 < x.numel() + 8 * (6 if x.size(-1) == 17 else 1)
        for op, arguments in (
            (ops.batch_moments, (x,)),
            (ops.batch_normalize, (x, *affine, 0, 0.0, None)),
            (ops.batch_normalize_masked, (x, *affine, RELU, 0.0, g)),
            (ops.batch_backward_reduce, (g, x, *affine, RELU, 0.0, mask)),
            (ops.batch_backward_input, (g, x, *affine, means, RELU, 0.0, None)),
            (ops.batch_backward_input_and_residual, (g, x, *affine, means, RELU, 0.0, mask)),
            (ops.batch_forward, (x, *affine[2:], 1e-5, RELU, 0.0, g)),
            (ops.batch_forward, (x, None, None, 1e-5, 0, 0.0, g)),
            (ops.batch_backward, (g, x, *affine, RELU, 0.0, mask, True)),
            (ops.batch_backward, (g, x, vector, vector, None, None, 0, 0.0, None, False)),
            (ops.batch_forward, (x, *affine[2:], 1e-5, 0, 0.0, None, [1, x.size(0) - 1])),
            (ops.batch_backward, (g, x, means, means, *affine[2:], 0, 0.0, None, False, [1, x.size(0) - 1])),
        ):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
def test_operators_refuse_what_they_would_misread() -> None:
    load()
    ops = torch.ops.syncnorm
    x, vector = torch.randn(4, 3, 20), torch.ones(3, dtype=torch.float64)
    affine = vector, vector, None, None
    with pytest.raises(RuntimeError, match=r"expected a contiguous \[N, C, S\] or \[M, C\] tensor"):
        ops.batch_moments(x.transpose(0, 1))
    with pytest.raises(RuntimeError, match="residual must be contiguous and of the shape and dtype of x"):
        ops.batch_normalize(x, *affine, 0, 0.0, x.double())
    with pytest.raises(RuntimeError, match="grad must be contiguous and of the shape and dtype of x"):
        ops.batch_backward_reduce(x[:2], x, *affine, 0, 0.0, None)
    with pytest.raises(RuntimeError, match="this is not the mask of x"):
        ops.batch_backward_reduce(x, x, *affine, RELU, 0.0, torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="expected a parameter of 3 entries, got 4"):
        ops.batch_normalize(x, vector, vector, torch.ones(4), None, 0, 0.0, None)
    with pytest.raises(RuntimeError, match="unknown activation 9"):
        ops.batch_normalize(x, *affine, 9, 0.0, None)
    for chunks in ([2, 1], [2, 3], [4, 0], [5, -1]):
        with pytest.raises(RuntimeError, match=r"expected chunks .* add up to 4, got \["):
            ops.batch_forward(x, None, None, 1e-5, 0, 0.0, None, chunks)
    with pytest.raises(RuntimeError, match="there is none for chunks"):
        ops.batch_forward(x, None, None, 1e-5, RELU, 0.0, x, [2, 2])
    with pytest.raises(RuntimeError, match="expected a parameter of 6 entries, got 3"):
        ops.batch_backward(x, x, *affine, 0, 0.0, None, False, [2, 2])


@needs_compiler
def test_empty_tensors_have_empty_results() -> None:
    load()
    ops = torch.ops.syncnorm
    for x in (torch.empty(0, 3, 20), torch.empty(4, 3, 0), torch.empty(0, 3), torch.empty(4, 0)):
        vector = torch.ones(x.size(1), dtype=torch.float64)
        affine = vector, vector, None, None
        assert all(torch.equal(t, torch.zeros(x.size(1), dtype=torch.float64)) for t in ops.batch_moments(x))
        assert torch.equal(ops.batch_normalize(x, *affine, RELU, 0.0, None), x)
        assert torch.equal(ops.batch_backward_reduce(x, x, *affine, 0, 0.0, None), torch.zeros(2, x.size(1)).double())
        y, mask = ops.batch_normalize_masked(x, *affine, RELU, 0.0, x)
        assert torch.equal(y, x) and mask.numel() == 0
        with pytest.raises(RuntimeError, match="expected values, got"):
            ops.batch_forward(x, None, None, 1e-5, 0, 0.0, None)
        with pytest.raises(RuntimeError, match="expected values, got"):
            ops.batch_backward(x, x, *affine, 0, 0.0, None, False)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    load()
    ops = torch.ops.syncnorm
    x = torch.randn(17, 37, 33, 31)  # enough for slabs
    vector = torch.rand(37, dtype=torch.float64) + 0.5
    before = torch.get_num_threads()
    try:
        outcomes = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for f in (x.flatten(2), x.movedim(1, -1).reshape(-1, 37)):
                affine = vector, vector, None, None
                y, mask = ops.batch_normalize_masked(f, *affine, RELU, 0.0, f)
                sums = ops.batch_backward_reduce(f, f, *affine, RELU, 0.0, mask)
                forward = ops.batch_forward(f, None, None, 1e-5, RELU, 0.0, f)
                backward = ops.batch_backward(f, f, *affine, RELU, 0.0, mask, True)
                outcomes.append((*ops.batch_moments(f), y, mask, sums, *forward, *backward))
                for sizes in ([9, 8], [1] * 17, [3, 3, 3, 3, 3, 2]):
                    outcomes[-1] += in_chunks(f, [n * f.size(0) // 17 for n in sizes])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(outcomes[:2], outcomes[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def in_chunks(f: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    ops = torch.ops.syncnorm
    y, mean, m2, rstd, _ = ops.batch_forward(f, None, None, 1e-5, GELU, 0.0, f, sizes)
    dx, dresidual, *affine = ops.batch_backward(f, f, mean, rstd, None, None, GELU, 0.0, f, True, sizes)
    return y, mean, m2, rstd, dx, dresidual, *affine


@needs_compiler
def test_a_chunk_is_what_it_is_by_itself() -> None:
    load()
    x = torch.randn(17, 37, 33, 31)
    flat = x.flatten(2), x.movedim(1, -1).reshape(-1, 37), x[..., :3, :2].flatten(2), x.double().flatten(2)[:, :5]
    for f in (each.contiguous() for each in flat):
        sizes = [n * f.size(0) // 17 for n in (1, 9, 2, 5)]
        *whole, dbias, dweight = in_chunks(f, sizes)
        parts = [in_chunks(part, []) for part in f.split(sizes)]
        y, mean, m2, rstd, dx, dresidual, dbiases, dweights = zip(*parts, strict=True)
        alone = (*(torch.cat(t) if t[0].dim() > 1 else torch.stack(t) for t in (y, mean, m2, rstd, dx, dresidual)),)
        assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))
        assert torch.equal(dbias, sum(dbiases)) and torch.equal(dweight, sum(dweights))


@needs_compiler
def test_large_outputs_bypass_the_caches_and_are_the_same() -> None:
    load()
    ops = torch.ops.syncnorm
    vector = torch.rand(64, dtype=torch.float64) + 0.5
    affine = vector, vector, None, None
    for x in (torch.randn(64, 64, 32, 32).flatten(2), torch.randn(1 << 16, 64)):
        assert x.nbytes >= 1 << 23  # kStreamBytes
        means = torch.stack([vector, vector])
        whole = ops.batch_normalize(x, *affine, RELU, 0.0, None), *ops.batch_backward_input_and_residual(
            x, x, *affine, means, RELU, 0.0, None
        )  # fmt: skip
        for start in range(0, x.size(0), x.size(0) // 4):
            at = slice(start, start + x.size(0) // 4)
            part = x[at]
            expected = ops.batch_normalize(part, *affine, RELU, 0.0, None), *ops.batch_backward_input_and_residual(
                part, part, *affine, means, RELU, 0.0, None
            )  # fmt: skip
            assert all(torch.equal(a[at], b) for a, b in zip(whole, expected, strict=True))


_FIRST_LOAD = """
import sys, threading
import torch
from syncnorm.kernels import native
from syncnorm.kernels.native import rows

sys.setswitchinterval(1e-6)
start, said, registered = threading.Barrier(4), [], []
register = torch.library.register_fake
torch.library.register_fake = lambda name, fake: (registered.append(name), register(name, fake))

def work():
    start.wait()
    x = torch.ones(2, 3)
    said.append((native.objection(x), rows.objection(x)))

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert said == [(None, None)] * 4, said
assert len(registered) == len(set(registered)) > 0, registered  # torch 2.11 raises at the second
"""


@needs_compiler
def test_threads_may_come_together_at_the_first_load() -> None:
    load()
    subprocess.run([sys.executable, "-c", _FIRST_LOAD], check=True, timeout=60)


def load() -> None:
    native.build()
    native._load.cache_clear()
    assert native.load() is None
