"""Tier: no process. Primitives with an activation and a residual, in every dtype, against float64 by autograd.

What a backend may lose is what the reference loses in the same dtype, a few times over: its own error against float64 is the
budget. Where that error can turn the sign of what the activation is applied to, no gradient is compared: it would be another
one, and not an inexact one.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from syncnorm.core.activation import Activation
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional import sync_batch_norm
from syncnorm.kernels import BACKENDS, alone, objections
from syncnorm.kernels.native import among

SERVING = [name for name, reason in objections(torch.empty(2, 3, 4)).items() if reason is None]
FAST = [name for name in SERVING if name != "reference"]
ALONE = [name for name in SERVING if alone(BACKENDS[name], torch.empty(2, 3)) is not None]
ACTIVATIONS = [None, Activation("relu"), Activation("leaky_relu", 0.2), Activation("silu"), Activation("gelu")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Flat forms, with lengths at and around whole vectors and bytes: [N, C, S] and [M, C].
SHAPES = [
    (1, 3, 199),
    (3, 1, 1023),
    (2, 17, 49),
    (5, 3, 16),
    (9, 7, 15),
    (1, 1, 2),
    (199, 3),
    (1023, 1),
    (3, 199),
    (13, 8),
]
EPS = 1e-5

Run = Callable[[str, dict[str, Tensor], Activation | None, bool], dict[str, Tensor | None]]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 3.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual, grad = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator)
    v = {"x": 2 * (x + offset), "residual": residual, "grad": grad}
    return {**{key: t.to(dtype) for key, t in v.items()}, "weight": weight, "bias": bias}


def dims(x: Tensor) -> tuple[int, ...]:
    return (0, 2) if x.dim() == 3 else (0,)


def exactly(v: dict[str, Tensor], activation: Activation | None, with_residual: bool) -> dict[str, Tensor]:
    """The composition of torch's functions in float64, and its gradients."""
    leaves = {key: v[key].to(torch.float64, copy=True).requires_grad_() for key in ("x", "residual", "weight", "bias")}
    wide = [1, -1, 1][: v["x"].dim()]
    x = leaves["x"]
    centred = x - x.mean(dims(x), keepdim=True)
    pre = centred * (centred.square().mean(dims(x), keepdim=True) + EPS).rsqrt()
    pre = pre * leaves["weight"].view(wide) + leaves["bias"].view(wide)
    pre = pre + leaves["residual"] if with_residual else pre
    y = pre if activation is None else activation(pre)
    gradients = torch.autograd.grad(y, list(leaves.values()), v["grad"].double(), allow_unused=True)
    return {"pre": pre.detach(), "y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def by_primitives(
    name: str, v: dict[str, Tensor], activation: Activation | None, with_residual: bool
) -> dict[str, Tensor | None]:
    backend, x, weight, bias = BACKENDS[name], v["x"], v["weight"], v["bias"]
    residual = v["residual"] if with_residual else None
    moments = backend.batch_moments(x)
    rstd = (moments.var + EPS).rsqrt()
    y, mask = backend.batch_normalize(x, moments.mean, rstd, weight, bias, activation, residual)
    is_masked = with_residual and activation is not None and activation.is_piecewise_linear
    assert (mask is not None) == is_masked
    side = mask if is_masked else residual if activation is not None else None
    sums = backend.batch_backward_reduce(v["grad"], x, moments.mean, rstd, weight, bias, activation, side)
    dx, dresidual = backend.batch_backward_input(
        v["grad"], x, moments.mean, rstd, weight, sums / moments.count, bias, activation, side, with_residual
    )  # fmt: skip
    assert (dresidual is not None) == (with_residual and activation is not None)
    assert y.dtype == dx.dtype == x.dtype
    return {"y": y, "x": dx, "weight": sums[1], "bias": sums[0], "residual": dresidual}


def by_whole_directions(
    name: str, v: dict[str, Tensor], activation: Activation | None, with_residual: bool
) -> dict[str, Tensor | None]:
    """As :func:`by_primitives`, by the two calls of a group of one."""
    whole = alone(BACKENDS[name], v["x"])
    assert whole is not None
    x, weight, bias = (
        v["x"],
        *(v[key].to(torch.promote_types(v["x"].dtype, torch.float32)) for key in ("weight", "bias")),
    )
    residual = v["residual"] if with_residual else None
    y, moments, rstd, mask = whole.batch_forward(x, weight, bias, EPS, activation, residual)
    is_masked = with_residual and activation is not None and activation.is_piecewise_linear
    assert (mask is not None) == is_masked and moments.count == x.numel() / x.size(1)
    side = mask if is_masked else residual if activation is not None else None
    dx, dresidual, dbias, dweight = whole.batch_backward(
        v["grad"], x, moments.mean, rstd, weight, bias, activation, side, with_residual
    )
    assert (dresidual is not None) == (with_residual and activation is not None)
    assert dbias.dtype == dweight.dtype == weight.dtype
    return {"y": y, "x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}


def by_calls_around_an_exchange(
    name: str, v: dict[str, Tensor], activation: Activation | None, with_residual: bool
) -> dict[str, Tensor | None]:
    """As :func:`by_primitives`, by the two calls each way of a rank among others, all of which have no samples."""
    x, weight, bias = (
        v["x"],
        *(v[key].to(torch.promote_types(v["x"].dtype, torch.float32)) for key in ("weight", "bias")),
    )
    residual, channels = v["residual"] if with_residual else None, x.size(1)
    row = among.batch_forward_row(x, 2 * channels + 9, (1.0, 7.0))
    assert row[2 * channels + 1 : -2].tolist() == [0.0] * 6
    y, moments, rstd, mask, words = among.batch_forward_rest(row, 2, x, weight, bias, EPS, activation, residual)
    is_masked = with_residual and activation is not None and activation.is_piecewise_linear
    assert (mask is not None) == is_masked and moments.count == x.numel() / channels and words == [1.0, 7.0]
    side = mask if is_masked else residual if activation is not None else None
    arguments = v["grad"], x, moments.mean, rstd, weight, bias, activation, side
    row, dbias, dweight = among.batch_backward_row(*arguments, 2 * channels + 9, (3.0,))
    assert row[2 * channels : -1].tolist() == [0.0] * 8
    dx, dresidual, words = among.batch_backward_rest(row, 1, moments.count, *arguments, with_residual)
    assert (dresidual is not None) == (with_residual and activation is not None) and words == [3.0]
    assert dbias.dtype == dweight.dtype == weight.dtype
    return {"y": y, "x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}


def test_the_composition_here_is_torchs() -> None:
    v = inputs((5, 3, 16), torch.float64)
    x, weight, bias = v["x"].clone().requires_grad_(), v["weight"].double(), v["bias"].double()
    y = functional.batch_norm(x, None, None, weight, bias, True, 0.0, EPS) + v["residual"]
    (dx,) = torch.autograd.grad(functional.gelu(y), x, v["grad"])
    torch.testing.assert_close(exactly(v, Activation("gelu"), True)["x"], dx)


def check(
    shape: tuple[int, ...], name: str, dtype: torch.dtype, activation: Activation | None, offset: float, run: Run
) -> None:
    for with_residual in (False, True):
        v = inputs(shape, dtype, offset)
        wide = {**v, **{key: v[key].to(torch.promote_types(dtype, torch.float32)) for key in ("x", "residual", "grad")}}
        pre = by_primitives("reference", wide, None, with_residual)["y"]
        assert pre is not None
        exact = exactly(v, activation, with_residual)
        if activation is not None and activation.is_piecewise_linear:
            margin = 4 * (pre.double() - exact["pre"]).abs().max()
            v["grad"] = torch.where(exact["pre"].abs() <= margin, 0, v["grad"])
            exact = exactly(v, activation, with_residual)
        reference = by_primitives("reference", v, activation, with_residual)
        for key, got in run(name, v, activation, with_residual).items():
            if got is None:
                continue
            true, theirs = exact[key], reference[key]
            assert theirs is not None
            # Rounding goes with the terms of a sum, and with what is subtracted, not with what is left.
            scale = true.abs().max()
            if key in ("weight", "bias"):
                scale = torch.maximum(scale, 4 * v["grad"].double().square().sum(dims(v["x"])).sqrt().max())
            if key == "x":
                scale = torch.maximum(scale, (v["weight"] * 1e-2).abs().max())
            eps = torch.finfo(dtype if key in ("y", "x", "residual") else wide["x"].dtype).eps
            # What float64 itself loses is that of the centring.
            held = 4 * eps * scale + 8 * torch.finfo(torch.float64).eps * v["x"].abs().max()
            # ATen multiplies before it subtracts, which costs other roundings of mean/std.
            budget = (16 if name == "aten" else 4) * (theirs.double() - true).abs().max() + held
            error = (got.double() - true).abs().max()
            assert error <= budget, (key, shape, with_residual, error.item(), budget.item())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name if a else "none")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_no_worse_than_the_reference(name: str, dtype: torch.dtype, activation: Activation | None) -> None:
    for shape in SHAPES:
        check(shape, name, dtype, activation, 3.0, by_primitives)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name if a else "none")
@pytest.mark.parametrize("name", ALONE)
def test_whole_directions_are_no_worse_either(name: str, activation: Activation | None) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            check(shape, name, dtype, activation, 3.0, by_whole_directions)
    check((2, 17, 49), name, torch.float32, activation, 1e6, by_whole_directions)


@pytest.mark.skipif("native" not in SERVING, reason="the native operators are not built")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name if a else "none")
def test_calls_around_an_exchange_are_no_worse_either(activation: Activation | None) -> None:
    # A row loses 1e-16·(mean/std)² of the variance, which float64 would notice: tests over ranks hold it to that.
    for dtype in DTYPES[1:]:
        for shape in SHAPES:
            check(shape, "native", dtype, activation, 3.0, by_calls_around_an_exchange)


# Slabs of two channels and one of the last, of one channel, and bytes of a mask that end within a run.
@pytest.mark.parametrize("shape", [(16, 41, 1100), (32, 19, 1003)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_whole_directions_slab_by_slab(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for activation in (None, Activation("leaky_relu", 0.2), Activation("gelu")):
        check(shape, name, dtype, activation, 3.0, by_whole_directions)


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name if a else "none")
@pytest.mark.parametrize("name", FAST)
def test_no_worse_than_the_reference_far_from_zero(name: str, activation: Activation | None, offset: float) -> None:
    for shape in ((2, 17, 49), (199, 3), (9, 7, 15)):
        check(shape, name, torch.float32, activation, offset, by_primitives)


@pytest.mark.parametrize("name", SERVING)
def test_a_mask_is_one_bit_an_element(name: str) -> None:
    for shape in SHAPES:
        v = inputs(shape, torch.float32)
        affine = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double(), None, None
        _, mask = BACKENDS[name].batch_normalize(v["x"], *affine, Activation("relu"), v["residual"])
        assert mask is not None and mask.dtype == torch.uint8
        # Runs of one channel may have whole bytes.
        assert mask.numel() * 8 < v["x"].numel() + 8 * (shape[0] * shape[1] if len(shape) == 3 else 1)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", SERVING)
def test_backward_decides_as_forward_did(name: str, with_residual: bool) -> None:
    # Nearly everything is within a rounding of the kink.
    backend, relu = BACKENDS[name], Activation("relu")
    for shape in ((4, 5, 333), (1001, 37)):
        generator = torch.Generator().manual_seed(0)
        x = 100 + torch.randint(-2, 3, shape, generator=generator) * 2.0**-17
        residual = torch.randn(shape, generator=generator) * 1e-7 if with_residual else None
        mean, rstd = torch.full((shape[1],), 100 + 1e-6).double(), torch.full((shape[1],), 1 / 3).double()
        weight, bias = torch.randn(2, shape[1], generator=generator) * torch.tensor([[1.0], [1e-6]])
        y, mask = backend.batch_normalize(x, mean, rstd, weight, bias, relu, residual)
        ones, zeros = torch.ones_like(x), torch.zeros(2, shape[1]).double()
        _, kept = backend.batch_backward_input(ones, x, mean, rstd, weight, zeros, bias, relu, mask, True)
        sums = backend.batch_backward_reduce(ones, x, mean, rstd, weight, bias, relu, mask)
        assert kept is not None and torch.equal(kept > 0, y > 0) and 0.2 < float(kept.mean()) < 0.8
        assert torch.equal(sums[0], kept.sum(dims(x)).double())


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", SERVING)
def test_relu_lets_nan_through_and_stops_infinite_gradients(name: str, with_residual: bool) -> None:
    backend, relu = BACKENDS[name], Activation("relu")
    for shape in ((2, 3, 40), (40, 3), (2, 3, 5)):
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).clone()
        residual = torch.zeros_like(x) if with_residual else None
        affine = torch.zeros(3).double(), torch.ones(3).double(), None, None
        _, mask = backend.batch_normalize(x, *affine, relu, residual)
        grad = torch.where(x < 0, torch.inf, 1.0)
        sums = backend.batch_backward_reduce(grad, x, *affine, relu, mask)
        zeros = torch.zeros(2, 3).double()
        dx, _ = backend.batch_backward_input(grad, x, *affine[:3], zeros, None, relu, mask)
        assert sums.isfinite().all() and dx.isfinite().all()
        x.view(-1)[7] = torch.nan
        y, _ = backend.batch_normalize(x, *affine, relu, residual)
        assert y.view(-1)[7].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", SERVING)
def test_residual_and_gradient_may_have_layouts_of_their_own(name: str, activation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual, grad = torch.randn(3, 4, 6, 5, 7, generator=generator, dtype=torch.float64)

    def layouts(t: Tensor) -> list[Tensor]:
        every_other = torch.stack([t, t], -1)[..., 0]
        return [
            t,
            t.contiguous(memory_format=torch.channels_last),
            t.transpose(0, 3).contiguous().transpose(0, 3),
            every_other,
        ]

    grads = [*layouts(grad)[1:], grad[:1].expand(4, -1, -1, -1)]
    for one, two, three in zip(layouts(x), layouts(residual)[::-1], grads, strict=True):
        leaves = [t.detach().requires_grad_() for t in (one, two)]
        ours = sync_batch_norm(
            leaves[0], None, None, training=True, group=LOCAL, backend=name, residual=leaves[1], activation=activation
        )
        pre = functional.batch_norm(leaves[0], None, None, None, None, True, 0.0, EPS) + leaves[1]
        theirs = getattr(functional, activation)(pre)
        for a, b in zip(*((y, *torch.autograd.grad(y, leaves, three)) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
