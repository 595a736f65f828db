"""Tier: no process. The native operators of row and group norms: what torch checks of them, threads, small rows."""

import pytest
import torch
from torch import Tensor

from syncnorm.kernels import native
from syncnorm.kernels.native import rows
from syncnorm.kernels.native._build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    native.build()
    native._load.cache_clear()
    assert rows.objection(torch.empty(2, 3)) is None


def test_operators_pass_torchs_own_checks() -> None:
    ops = torch.ops.syncnorm
    for dtype in (torch.float32, torch.bfloat16):
        x, g = torch.randn(2, 5, 7, dtype=dtype)
        weight, stat = torch.ones(7), torch.rand(5)
        groups = torch.randn(2, 6, 4, dtype=dtype)
        mean = torch.rand(2, 3)
        apart, stats = torch.randn(2, 2, 6, 9, dtype=dtype).transpose(2, 3), torch.rand(18)
        for op, arguments in (
            (ops.row_norm_forward, (x, weight, weight, 1e-5, True, g, None)),
            (ops.row_norm_forward, (x, None, None, 1e-5, False, None, 3)),
            (ops.row_norm_backward, (g, x, weight, stat, stat, True, True, g, None)),
            (ops.row_norm_backward, (g, x, None, None, stat, False, False, None, 3)),
            (ops.row_norm_forward, (apart[0], torch.ones(6), None, 1e-5, True, apart[1], None)),
            (ops.row_norm_backward, (apart[0], apart[1], None, stats, stats, True, False, apart[0], None)),
            *(
                case
                for y in (groups, groups.transpose(1, 2).contiguous().transpose(1, 2))
                for case in (
                    (ops.group_norm_forward, (y, 3, None, torch.ones(6), 1e-5, 3, 0.0)),
                    (ops.group_norm_backward, (y, y, 3, torch.ones(6), None, mean, mean, 2, 0.1)),
                )
            ),
        ):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, g = torch.randn(2, 700, 133)
    y, dy = torch.randn(2, 3, 36, 2100)
    inner, d_inner = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (y, dy))
    before, outcomes = torch.get_num_threads(), []

    def all_results() -> list[Tensor]:
        results = list(rows.row_norm_forward(x, None, None, 1e-5, True)[::2])
        results += rows.row_norm_backward(g, x, None, results[1], results[1], True, True)
        apart, d_apart = y.transpose(1, 2), dy.transpose(1, 2)
        z, _, mean, rstd = rows.row_norm_forward(apart, None, None, 1e-5, True)
        results += [z, *rows.row_norm_backward(d_apart, apart, None, mean, rstd, True, True)]
        for a, b in ((y, dy), (inner, d_inner)):
            z, mean, rstd = rows.group_norm_forward(a, 4, None, None, 1e-5)
            results += [z, mean, rstd, *rows.group_norm_backward(b, a, 4, None, None, mean, rstd)]
        return results

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(all_results())
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_layouts_that_are_neither_are_refused() -> None:
    x = torch.randn(2, 6, 8)[:, :, ::2]
    with pytest.raises(RuntimeError, match="expected a contiguous tensor, or one with channels innermost"):
        rows.group_norm_forward(x, 3, None, None, 1e-5)
    y = torch.randn(2, 6, 4)
    inner = y.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="grad must be laid out like x"):
        rows.group_norm_backward(inner, y, 3, None, None, y[:, :3, 0], y[:, :3, 0])
    for rows_ in (x[0].T, y, x.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="expected contiguous rows"):
            rows.row_norm_forward(rows_, None, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="expected tensors alike"):
        rows.row_norm_forward(y.transpose(1, 2), None, None, 1e-5, True, y.transpose(1, 2).contiguous())
    with pytest.raises(RuntimeError, match="with a part"):
        rows.row_norm_forward(y.transpose(1, 2), None, None, 1e-5, False, None, 2)
