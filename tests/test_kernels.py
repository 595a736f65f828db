"""Tier: no process. Every backend's primitives against float64 formulas written out here, on awkward sizes and layouts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from syncnorm.core.layout import flatten, flatten_like, unflatten
from syncnorm.kernels import BACKENDS, choose, objections

SERVING = [name for name, reason in objections(torch.empty(2, 3, 4)).items() if reason is None]
SHAPES = [
    (1, 1, 2),
    (3, 3, 1, 1),
    (2, 65, 7, 3),
    (5, 3, 199),
    (199, 3),
    (2, 3, 3, 2, 5),
    (2, 300, 33, 33),
    (1, 2, 9999),
]
# float32 sums run over at most 4096 terms: sqrt(4096) roundings of half an ulp, twice over for the square of a deviation.
HELD = 2 * 64 * 2**-25
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(x: Tensor) -> list[Tensor]:
    """The same values laid out in every way a user may bring."""
    out = [x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.transpose(0, -1).contiguous().transpose(0, -1)]
    out.append(torch.stack([x, x], -1)[..., 0])
    if x.dim() == 4:
        out.append(x.contiguous(memory_format=torch.channels_last))
    if x.dim() == 5:
        out.append(x.contiguous(memory_format=torch.channels_last_3d))
    return out


def formulas(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> dict[str, np.ndarray]:
    """Batch norm and its gradient in numpy float64, from the textbook."""
    x64, g64 = x.double().numpy(), g.double().numpy()
    axes = tuple(d for d in range(x.dim()) if d != 1)
    wide = [1 if d != 1 else -1 for d in range(x.dim())]
    w, b = (v.double().numpy().reshape(wide) for v in (weight, bias))
    mean, var = x64.mean(axes, keepdims=True), x64.var(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    x_hat = (x64 - mean) * rstd
    mean_g, mean_gx = g64.mean(axes, keepdims=True), (g64 * x_hat).mean(axes, keepdims=True)
    return {
        "mean": mean.ravel(), "var": var.ravel(), "y": x_hat * w + b, "sum_g": g64.sum(axes), "sum_gx": (g64 * x_hat).sum(axes),
        "dx": rstd * w * (g64 - mean_g - x_hat * mean_gx),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SERVING)
def test_primitives_equal_the_formulas_in_every_layout(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(*shape, generator=generator) * 2 + 3).to(dtype)
    g = torch.randn(*shape, generator=generator).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator)
    exact = formulas(x, g, weight, bias, 1e-5)
    backend = BACKENDS[name]
    # One rounding to the dtype, plus what sums lose.
    ulp, held = torch.finfo(dtype).eps, 1e-13 if dtype == torch.float64 else HELD
    for laid in layouts(x):
        flat = flatten(laid)
        grad = flatten_like(g, flat)
        moments = backend.batch_moments(flat)
        assert moments.count == x.numel() / shape[1]
        rstd = (moments.var + 1e-5).rsqrt()
        y = unflatten(backend.batch_normalize(flat, moments.mean, rstd, weight, bias)[0], x.shape)
        sums = backend.batch_backward_reduce(grad, flat, moments.mean, rstd)
        dx, _ = backend.batch_backward_input(grad, flat, moments.mean, rstd, weight, sums / moments.count)
        got = {
            "mean": moments.mean, "var": moments.var, "y": y, "sum_g": sums[0], "sum_gx": sums[1], "dx": unflatten(dx, x.shape)
        }  # fmt: skip
        for key, value in got.items():
            scale = np.abs(exact[key]).max()
            if key.startswith("sum"):  # rounding goes with the terms, not with their sum
                scale = max(scale, np.sqrt(moments.count) * 3)
            if key == "dx":  # and here with what is subtracted
                scale = max(scale, float((rstd * weight).abs().max()))
            bound = (held + (2 * ulp if key in ("y", "dx") else 0)) * scale
            error = np.abs(value.double().numpy() - exact[key]).max()
            assert error <= bound, (key, laid.stride(), error, bound)
        assert y.dtype == dx.dtype == dtype and sums.dtype == moments.mean.dtype == torch.float64


@pytest.mark.parametrize("name", SERVING)
def test_affine_may_be_missing(name: str) -> None:
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, rstd = x.mean((0, 2)), (x.var((0, 2), correction=0) + 1e-5).rsqrt()
    ones, bias = torch.ones(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    exact = formulas(x, x, ones, bias, 1e-5)["y"]
    backend = BACKENDS[name]
    for weight, shift in ((None, bias), (ones, bias), (None, None), (ones, None)):
        y, _ = backend.batch_normalize(flatten(x), mean, rstd, weight, shift)
        missing = 0 if shift is not None else bias.numpy().reshape(1, -1, 1)
        np.testing.assert_allclose(y.numpy(), exact - missing, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (8, 256, 7, 7), (64, 16, 3, 1), (2, 4, 300, 333)], ids=str)
@pytest.mark.parametrize("name", SERVING)
def test_variance_at_mean_1e4_std_is_no_worse_than_torchs(name: str, shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2)) + 1e4
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    exact = x.double().var((0, 2, 3), correction=1)
    theirs = torch.nn.BatchNorm2d(shape[1], momentum=1.0)
    theirs(x)
    ours = BACKENDS[name].batch_moments(flatten(x)).unbiased_var
    # The float32 of torch's buffer alone costs half an ulp, which is no merit of ours.
    allowed = max(float(((theirs.running_var.double() - exact) / exact).abs().max()), 2**-24)
    assert float(((ours - exact) / exact).abs().max()) <= allowed


def test_any_sample_will_do_as_pivot() -> None:
    # The sampled sixteenth lies 1e6 away from everything else: the worst case of the bound, a loss of 4 bits, and all the
    # deviations are alike, so that the roundings of a sum of 1600 add up instead of cancelling.
    for shape, part in (((4, 3, 1600), (..., slice(0, 100))), ((1600, 3), (slice(None, None, 16),))):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        x[part] += 1e6
        exact = x.double().var((0, 2) if x.dim() == 3 else 0, correction=0)
        ours = BACKENDS["aten"].batch_moments(flatten(x)).var
        torch.testing.assert_close(ours, exact, rtol=16 * 1600 * 2**-25, atol=0)


@pytest.mark.parametrize("name", SERVING)
def test_variance_far_below_eps_survives(name: str) -> None:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-6 + 1e-3
    exact = x.double().var((0, 2, 3), correction=0)
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(BACKENDS[name].batch_moments(flatten(laid)).var, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SERVING)
def test_half_precision_counts_beyond_its_largest_number(name: str) -> None:
    x = torch.full((2, 1, 260, 260), 2.0, dtype=torch.float16)  # 135,200 values per channel; float16 ends at 65,504
    moments = BACKENDS[name].batch_moments(flatten(x))
    assert (moments.count, float(moments.mean), float(moments.var)) == (135200.0, 2.0, 0.0)


def test_flat_forms_are_views_and_layouts_come_back() -> None:
    x = torch.randn(2, 3, 4, 5)
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        flat = flatten(laid)
        assert flat.data_ptr() == laid.data_ptr() and flat.is_contiguous()
        back = unflatten(flat, x.shape)
        assert back.stride() == laid.stride() and torch.equal(back, x)
    sequence = torch.randn(2, 5, 3).transpose(1, 2)  # [N, C, L] with channels innermost
    assert flatten(sequence).data_ptr() == sequence.data_ptr()


def test_choice_of_backend_is_explained_or_refused() -> None:
    x = torch.randn(2, 3, 4)
    assert choose("auto", x) is BACKENDS[SERVING[0]]
    assert choose("reference", x) is BACKENDS["reference"]
    assert list(objections(x)) == ["native", "aten", "triton", "reference"]
    assert objections(x)["aten"] is None
    meta = torch.empty(2, 3, 4, device="meta")
    assert choose("auto", meta) is BACKENDS["reference"]
    with pytest.raises(RuntimeError, match=r"backend='aten' was asked for and cannot run: .* on meta"):
        choose("aten", meta)
    with pytest.raises(
        ValueError, match=r"backend must be one of \['auto', 'native', 'aten', 'triton', 'reference'\], got 'cudnn'"
    ):
        choose("cudnn", x)
