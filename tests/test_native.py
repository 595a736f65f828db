"""Tier: no process. The native operators: built on request into a cache, opaque to the compiler, explained when missing."""

from pathlib import Path

import pytest
import torch

from syncnorm.errors import SyncNormError
from syncnorm.kernels import native
from syncnorm.kernels.native import _build

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
    native.build()
    native._load.cache_clear()
    assert native.load() is None
    ops = torch.ops.syncnorm
    vector = torch.rand(3, dtype=torch.float64) + 0.5
    for x in (torch.randn(2, 3, 5), torch.randn(7, 3, dtype=torch.bfloat16)):
        g = torch.randn_like(x)
        for op, arguments in (
            (ops.batch_moments, (x,)),
            (ops.batch_normalize, (x, vector, vector, torch.ones(3), None)),
            (ops.batch_backward_reduce, (g, x, vector, vector)),
            (ops.batch_backward_input, (g, x, vector, vector, None, torch.rand(2, 3, dtype=torch.float64))),
        ):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    native.build()
    native._load.cache_clear()
    assert native.load() is None
    x = torch.randn(9, 37, 33, 31)
    before = torch.get_num_threads()
    try:
        outcomes = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outcomes += [torch.ops.syncnorm.batch_moments(f) for f in (x.flatten(2), x.movedim(1, -1).reshape(-1, 37))]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[1], outcomes[3])
