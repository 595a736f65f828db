"""Tier: no process. Row and group primitives of every backend against float64 formulas written out here."""

from math import erf

import numpy as np
import pytest
import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.kernels.rows import ROW_BACKENDS, choose_rows, row_objections, takes_features_apart

SERVING = [name for name, reason in row_objections(torch.empty(2, 3)).items() if reason is None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS = [(1, 1), (3, 2), (199, 3), (5, 17), (7, 199), (3, 1023), (70, 64), (2, 5000), (300, 48)]
# N, D, S: the channels of [N, D, S] are the features of its positions
APART = [(1, 1, 1), (3, 1, 50), (2, 3, 7), (1, 199, 49), (2, 1023, 8), (5, 66, 50), (1, 2, 1030), (70, 5, 16)]
# N, C, S, G
GROUPS = [
    (1, 2, 1, 1), (3, 6, 1, 2), (2, 6, 4, 3), (3, 4, 9, 4), (2, 64, 49, 32), (1, 3, 199, 1), (2, 34, 17, 17),
    (5, 65, 31, 5), (2, 8, 1023, 2), (1, 4, 5000, 2),
]  # fmt: skip
ACTIVATIONS = [None, Activation("relu"), Activation("leaky_relu", 0.2), Activation("silu"), Activation("gelu")]


def _array(t: Tensor) -> np.ndarray:
    return t.double().numpy()


def _close(
    got: Tensor, want: np.ndarray, dtype: torch.dtype, ratio: float = 0.0, scale: np.ndarray | None = None
) -> None:
    """Within a few roundings of float32 arithmetic, on data ``ratio`` deviations away from 0, and one of its own dtype.

    A mean held in float32 is off by half an ulp, in deviations ``ratio``·2^-24, and a few terms of that size meet. Roundings
    are relative to the largest result, or to ``scale``, which for sums is that of the sizes of what is added up.
    """
    unit = 2.0**-50 if dtype == torch.float64 else 2.0**-24  # in float64 the formulas written out round as well
    assert tuple(got.shape) == want.shape
    largest = float(np.abs(want if scale is None else scale).max(initial=1.0))
    error = float(np.abs(_array(got) - want).max(initial=0.0))
    assert error <= largest * (unit * (16 + 12 * ratio) + torch.finfo(got.dtype).eps), (error, largest)


def _sample(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def _rows_by_hand(
    h: np.ndarray, g: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float, centre: bool, part: int | None
) -> dict[str, np.ndarray]:
    mean = h.mean(1, keepdims=True) if centre else np.zeros((len(h), 1))
    rstd = 1 / np.sqrt(((h - mean)[:, :part] ** 2).mean(1, keepdims=True) + eps)
    x_hat, u = (h - mean) * rstd, g * w
    used = np.arange(h.shape[1]) < (part or h.shape[1])
    dx = u - used * x_hat * (u * x_hat).sum(1, keepdims=True) / used.sum()
    dx = rstd * (dx - (u.mean(1, keepdims=True) if centre else 0))
    return {
        "y": x_hat * w + b, "mean": mean[:, 0], "rstd": rstd[:, 0],
        "dx": dx, "dweight": (g * x_hat).sum(0), "dbias": g.sum(0), "sizes": (np.abs(g) * (1 + np.abs(x_hat))).sum(0),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("kind", ["layer", "rms", "partial rms"])
def test_rows_equal_the_formulas(name: str, shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    kernel, centre, eps = ROW_BACKENDS[name], kind == "layer", 1e-3
    part = max(1, shape[1] // 3) if kind == "partial rms" else None
    x, residual, grad, grad_h = (_sample(shape, dtype, 0.5, seed) for seed in range(4))
    weight, bias = _sample(shape[1:], torch.float32, 0.5, 5), _sample(shape[1:], torch.float32, 0.5, 6)
    for second, more in ((None, None), (residual, grad_h)):
        y, h, mean, rstd = kernel.row_norm_forward(x, weight, bias if centre else None, eps, centre, second, part)
        assert (h is None) == (second is None) and (mean is None) != centre
        whole = x if h is None else h
        assert torch.equal(whole, x if second is None else x + second)
        want = _rows_by_hand(_array(whole), _array(grad), _array(weight), _array(bias) * centre, eps, centre, part)
        dx, dweight, dbias = kernel.row_norm_backward(grad, whole, weight, mean, rstd, True, centre, more, part)
        want["dx"] += 0 if more is None else _array(more)
        assert y.dtype == dx.dtype == dtype and y.is_contiguous() and dx.is_contiguous()
        assert rstd.dtype == dweight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        _close(y, want["y"], dtype)
        peak = float(want["rstd"].max())  # rows of one or two values may lie close together
        _close(dx, want["dx"], dtype, ratio=peak)
        _close(rstd.view(-1), want["rstd"], dtype)
        _close(dweight, want["dweight"], dtype, peak, want["sizes"])
        if centre:
            _close(mean.view(-1), want["mean"], dtype)
            _close(dbias, want["dbias"], dtype, scale=want["sizes"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", APART, ids=str)
@pytest.mark.parametrize(
    "name", [name for name in SERVING if takes_features_apart(ROW_BACKENDS[name], torch.empty(1, 99, 1))]
)
@pytest.mark.parametrize("centre", [True, False])
def test_features_that_lie_apart(name: str, shape: tuple[int, int, int], dtype: torch.dtype, centre: bool) -> None:
    kernel, (n, d, s) = ROW_BACKENDS[name], shape
    x, residual, grad, grad_h = (_sample(shape, dtype, 0.5, seed).transpose(1, 2) for seed in range(4))
    weight, bias = _sample((d,), torch.float32, 0.5, 5), _sample((d,), torch.float32, 0.5, 6)
    for second, more in ((None, None), (residual, grad_h)):
        y, h, mean, rstd = kernel.row_norm_forward(x, weight, bias if centre else None, 1e-3, centre, second)
        whole = x if h is None else h
        assert torch.equal(whole, x if second is None else x + second) and (h is None) == (second is None)
        dx, dweight, dbias = kernel.row_norm_backward(grad, whole, weight, mean, rstd, True, centre, more)
        for t in (y, whole, dx):
            assert t.dtype == dtype and t.shape == (n, s, d) and t.transpose(1, 2).is_contiguous()
        rows = [_array(t).reshape(-1, d) for t in (whole, grad)]
        want = _rows_by_hand(*rows, _array(weight), _array(bias) * centre, 1e-3, centre, None)
        want["dx"] += 0 if more is None else _array(more).reshape(-1, d)
        peak = float(want["rstd"].max())
        _close(y.reshape(-1, d), want["y"], dtype)
        _close(dx.reshape(-1, d), want["dx"], dtype, ratio=peak)
        _close(rstd, want["rstd"], dtype)
        _close(dweight, want["dweight"], dtype, peak, want["sizes"])
        if centre:
            _close(mean, want["mean"], dtype)
            _close(dbias, want["dbias"], dtype, scale=want["sizes"])


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SERVING)
def test_means_far_from_zero(name: str, dtype: torch.dtype, offset: float) -> None:
    kernel = ROW_BACKENDS[name]
    x, grad = _sample((9, 1023), dtype, offset), _sample((9, 1023), dtype)
    ones, zeros = torch.ones(1023), torch.zeros(1023)
    want = _rows_by_hand(_array(x), _array(grad), _array(ones), _array(zeros), 1e-5, True, None)
    y, _, mean, rstd = kernel.row_norm_forward(x, None, None, 1e-5, True)
    dx, dweight, _ = kernel.row_norm_backward(grad, x, None, mean, rstd, True, False)
    for got, name_ in ((y, "y"), (dx, "dx"), (dweight, "dweight")):
        _close(got, want[name_], dtype, offset, want["sizes"] if name_ == "dweight" else None)
    if takes_features_apart(kernel, x[None]):
        y, _, mean, rstd = kernel.row_norm_forward(x.T.contiguous().T[None], None, None, 1e-5, True)
        dx, dweight, _ = kernel.row_norm_backward(
            grad.T.contiguous().T[None], x.T.contiguous().T[None], None, mean, rstd, True, False
        )
        for got, name_ in ((y[0], "y"), (dx[0], "dx"), (dweight, "dweight")):
            _close(got, want[name_], dtype, offset, want["sizes"] if name_ == "dweight" else None)
    for inner in (False, True):
        x = _sample((3, 6, 341), dtype, offset)
        grad = _sample((3, 6, 341), dtype)
        want = _groups_by_hand(_array(x), _array(grad), np.ones(6), np.zeros(6), 2, None)
        x, grad = (_laid_out(t, inner) for t in (x, grad))
        y, mean, rstd = kernel.group_norm_forward(x, 2, None, None, 1e-5)
        dx, dweight, _ = kernel.group_norm_backward(grad, x, 2, None, None, mean, rstd)
        for got, name_ in ((y, "y"), (dx, "dx"), (dweight, "dweight")):
            _close(got, want[name_], dtype, offset, want["sizes"] if name_ == "dweight" else None)


def _act(name: str, slope: float, pre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The function and its derivative."""
    if name in ("relu", "leaky_relu"):
        slope = slope if name == "leaky_relu" else 0.0
        return np.where(pre > 0, pre, slope * pre), np.where(pre > 0, 1.0, slope)
    if name == "silu":
        sigmoid = 1 / (1 + np.exp(-pre))
        return pre * sigmoid, sigmoid * (1 + pre * (1 - sigmoid))
    cdf = (1 + np.vectorize(erf)(pre / np.sqrt(2))) / 2
    return pre * cdf, cdf + pre * np.exp(-(pre**2) / 2) / np.sqrt(2 * np.pi)


def _groups_by_hand(
    x: np.ndarray, g: np.ndarray, w: np.ndarray, b: np.ndarray, groups: int, activation: Activation | None
) -> dict[str, np.ndarray]:
    n, c, s = x.shape
    grouped = x.reshape(n, groups, -1)
    mean = grouped.mean(2, keepdims=True)
    rstd = 1 / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    x_hat = ((grouped - mean) * rstd).reshape(n, c, s)
    y = pre = x_hat * w[:, None] + b[:, None]
    if activation is not None:
        y, slope = _act(*activation, pre)
        g = g * slope
    u = (g * w[:, None]).reshape(n, groups, -1)
    inner = (u * x_hat.reshape(n, groups, -1)).mean(2, keepdims=True)
    dx = rstd * (u - u.mean(2, keepdims=True) - x_hat.reshape(n, groups, -1) * inner)
    return {
        "y": y, "pre": pre, "mean": mean[..., 0], "rstd": rstd[..., 0], "dx": dx.reshape(n, c, s),
        "dweight": (g * x_hat).sum((0, 2)), "dbias": g.sum((0, 2)), "sizes": (np.abs(g) * (1 + np.abs(x_hat))).sum((0, 2)),
    }  # fmt: skip


def _laid_out(x: Tensor, inner: bool) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if inner else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("inner", [False, True])
def test_groups_equal_the_formulas(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, inner: bool
) -> None:
    kernel, (n, c, s, groups) = ROW_BACKENDS[name], shape
    x, grad = (_sample((n, c, s), dtype, 0.5, seed) for seed in range(2))
    weight, bias = (_sample((c,), torch.float32, 0.5, seed) for seed in (5, 6))
    for activation in ACTIVATIONS:
        want = _groups_by_hand(_array(x), _array(grad), _array(weight), _array(bias), groups, activation)
        # A relu is not decided by rounding here: what lies too near the kink is moved to neither side, and left out.
        kink = activation is not None and activation.is_piecewise_linear and (np.abs(want["pre"]) < 1e-5).any()
        x_, grad_ = _laid_out(x, inner), _laid_out(grad, inner)
        y, mean, rstd = kernel.group_norm_forward(x_, groups, weight, bias, 1e-5, activation)
        assert y.dtype == dtype and mean.shape == rstd.shape == (n, groups)
        assert y.transpose(1, 2).is_contiguous() if inner else y.is_contiguous()
        _close(y, want["y"], dtype)
        _close(mean, want["mean"], dtype)
        if kink:
            continue
        dx, dweight, dbias = kernel.group_norm_backward(grad_, x_, groups, weight, bias, mean, rstd, activation)
        assert dx.dtype == dtype
        peak = float(want["rstd"].max())
        _close(dx, want["dx"], dtype, ratio=peak)
        _close(dweight, want["dweight"], dtype, peak, want["sizes"])
        _close(dbias, want["dbias"], dtype, scale=want["sizes"])


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', .*'reference'\], got 'fast'"):
        choose_rows("fast", torch.empty(2, 3))
