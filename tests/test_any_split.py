"""Tier: no process (ranks are threads). Any split of any batch over ranks equals float64 batch norm on the whole of it.

SYNCNORM_CASES=20000 pytest tests/test_any_split.py       # before a release: other ones each time; 2000 are always the same
"""

# R ranks, C channels, n_r samples on rank r; u is the unit roundoff of the input's dtype

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import syncnorm
from syncnorm.kernels import native
from tests.threads import ThreadRanks, thread_ranks

ASKED = os.environ.get("SYNCNORM_CASES")
CASES = int(ASKED or 2000)
# Roundings of a few operations, counted as one each in the scales below; 2.7 was the worst of 20,000 cases.
LIMIT = 8.0
LAYOUTS = ("contiguous", "channels last", "transposed", "strided", "offset", "expanded")
NATIVE = native.objection(torch.zeros(1, 1)) is None
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One batch, cut into shards."""

    shards: tuple[int, ...]
    channels: int
    space: tuple[int, ...]
    dtype: torch.dtype
    layouts: tuple[str, ...]
    offset: float
    spread: float
    momentum: float | None
    affine: bool
    backend: str
    seed: int


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    ranks = draw(st.integers(2, 5))
    return Case(
        shards=draw(st.tuples(*[st.integers(0, 4)] * ranks)),
        channels=draw(st.integers(1, 5)),
        space=draw(st.tuples(*[st.integers(1, 3)] * draw(st.integers(0, 3)))),
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * ranks)),
        offset=draw(st.sampled_from([0.0, 1.0, -30.0, 1e3, -1e4])),
        spread=draw(st.sampled_from([0.0, 1e-3, 1.0, 1e2])),
        momentum=draw(st.sampled_from([0.1, None, 1.0])),
        affine=draw(st.booleans()),
        backend=draw(st.sampled_from(["auto", "aten", "reference"])),
        seed=draw(st.integers(0, 2**31)),
    )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other places of memory."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_full((1, *x.shape[1:]), torch.nan), x])[1:]
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x


def shards_of(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(sum(case.shards), case.channels, *case.space, generator=generator, dtype=torch.float64)
    x = (x + case.offset) * case.spread if case.spread else x * 0 + case.offset
    x = x.clamp(-6e4, 6e4).to(case.dtype) if case.dtype == torch.float16 else x.to(case.dtype)
    return [lay_out(part, layout) for part, layout in zip(x.split(case.shards), case.layouts, strict=True)]


def vectors(case: Case) -> list[Tensor]:
    """Weight, bias, running mean, running variance."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    draws = torch.randn(4, case.channels, generator=generator, dtype=torch.float64)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return [*draws[:3].to(dtype), (draws[3].square() + 0.5).to(dtype)]


def one_rank(case: Case, xs: list[Tensor], gs: list[Tensor]) -> dict[str, Tensor]:
    rank = dist.get_rank()
    weight, bias, mean, var = vectors(case)
    layer = syncnorm.SyncBatchNorm(
        case.channels, momentum=case.momentum, affine=case.affine, backend=case.backend, dtype=weight.dtype
    )
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    if case.affine:
        layer.weight.data, layer.bias.data = weight, bias
    x = xs[rank].detach().requires_grad_()
    y = layer(x)
    y.backward(gs[rank])
    out = {"y": y.detach(), "dx": x.grad, "mean": layer.running_mean, "var": layer.running_var}
    out["count"] = layer.num_batches_tracked
    if case.affine:
        out |= {"dweight": layer.weight.grad, "dbias": layer.bias.grad}
    return out


def whole(case: Case, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The formulas, in float64, on the concatenation; their scales beside them."""
    weight, bias, mean, var = (v.double() for v in vectors(case))
    if not case.affine:
        weight, bias = torch.ones_like(weight), torch.zeros_like(bias)
    dims = [d for d in range(x.dim()) if d != 1]
    n = x.numel() // x.size(1)

    def wide(v: Tensor) -> Tensor:
        return v.view(-1, *[1] * (x.dim() - 2))

    mu = x.mean(dims)
    centred = x - wide(mu)
    m2 = centred.square().sum(dims)
    rstd = (m2 / n + 1e-5).rsqrt()
    x_hat = centred * wide(rstd)
    dbias, dweight = g.sum(dims), (g * x_hat).sum(dims)
    dx = wide(weight * rstd) * (g - wide(dbias) / n - x_hat * wide(dweight) / n)
    momentum = 1.0 if case.momentum is None else case.momentum
    return {
        "y": x_hat * wide(weight) + wide(bias), "dx": dx, "dweight": dweight, "dbias": dbias,
        "mean": (1 - momentum) * mean + momentum * mu, "var": (1 - momentum) * var + momentum * m2 / (n - 1),
        "x_hat": x_hat, "rstd": rstd, "weight": weight, "mu": mu, "batch_var": m2 / n,
        "x_max": x.abs().max(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], ThreadRanks]]:
    with thread_ranks() as source:
        yield source


def compare(case: Case, found: list[dict[str, Tensor]], exact: dict[str, Tensor], g: Tensor) -> dict[str, float]:
    """The largest error of each result, in units of what its dtype and its terms allow."""
    u, wire = torch.finfo(case.dtype).eps / 2, 2.0**-53
    inner = wire if case.dtype == torch.float64 else 2.0**-24  # in which values are normalised
    mu, rstd, weight, x_hat = exact["mu"].abs(), exact["rstd"], exact["weight"].abs(), exact["x_hat"]
    n, x_max, g_max = g.numel() // g.size(1), float(x_hat.abs().max()), float(g.abs().max())
    # Of the variance, Σx² over the wire costs 2^-53·μ², and Welford's updates in float32, which only the reference makes,
    # 2^-24·μσ; rstd loses half of that, relative to var + eps.
    lost_var = inner * exact["batch_var"] + wire * mu.square()
    if case.backend == "reference":
        lost_var += inner * mu * exact["batch_var"].sqrt()
    lost_rstd = float((lost_var * rstd.square()).max())
    # The mean is float64 where native kernels run; others round μ, or x·rstd and μ·rstd, to the dtype they compute in.
    lost_mean = float((mu * rstd).max()) * (wire if case.backend == "auto" and NATIVE else inner)
    lost_x_hat = inner * (1 + x_max) + lost_rstd * x_max + lost_mean
    y, dx = (torch.cat([f[name] for f in found]).double() for name in ("y", "dx"))
    scales = {
        "y": u * float(exact["y"].abs().max()) + float(weight.max()) * lost_x_hat,
        "dx": u * float(exact["dx"].abs().max())
        + float((weight * rstd).max()) * g_max * ((inner + lost_rstd) * (1 + x_max**2) + lost_x_hat * (1 + x_max)),
        "mean": inner * max(float(exact["x_max"]), float(exact["mean"].abs().max())),
        "var": inner * float(exact["var"].abs().max()) + n / (n - 1) * float(lost_var.max()),
        "dweight": n * g_max * lost_x_hat,
        "dbias": n * g_max * inner,
    }
    totals = {name: sum(f[name].double() for f in found) for name in ("dweight", "dbias") if case.affine}
    results = {"y": y, "dx": dx, "mean": found[0]["mean"].double(), "var": found[0]["var"].double(), **totals}
    return {
        name: float((value - exact[name]).abs().max()) / max(scales[name], 1e-300) for name, value in results.items()
    }


@pytest.mark.timeout(120 + CASES // 10)
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=not ASKED,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_any_split_equals_the_whole_batch(pools: Callable[[int], ThreadRanks], case: Case) -> None:
    xs = shards_of(case)
    x = torch.cat(xs).double()
    generator = torch.Generator().manual_seed(case.seed + 2)
    gs = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(case.dtype) for part in xs]
    g = torch.cat(gs).double()
    values = x.numel() // case.channels
    if values == 1:
        with pytest.raises(ValueError, match="expected more than 1 value per channel in the whole group"):
            pools(len(xs)).run(one_rank, case, xs, gs)
        return
    found = pools(len(xs)).run(one_rank, case, xs, gs)
    for part, of_rank in zip(xs, found, strict=True):
        assert of_rank["y"].shape == of_rank["dx"].shape == part.shape
        assert of_rank["y"].dtype == of_rank["dx"].dtype == case.dtype
        assert all(of_rank[name].equal(found[0][name]) for name in ("mean", "var", "count"))  # the same bits
        assert int(of_rank["count"]) == (values > 0)
    if values == 0:
        assert all(found[0][name].equal(v) for name, v in zip(("mean", "var"), vectors(case)[2:], strict=True))
        return
    exact = whole(case, x, g)
    assert bool((found[0]["var"] >= 0).all())
    if bool((exact["batch_var"] == 0).all()) and case.momentum != 0.1 and case.dtype != torch.float64:
        # A constant channel has no variance, not one of 1e-12. Squares of float64 values are rounded on the wire.
        assert bool((found[0]["var"] == 0).all())
    errors = compare(case, found, exact, g)
    event(f"worst of {case.dtype}: {max(errors, key=lambda name: errors[name])}")
    assert all(error <= LIMIT for error in errors.values()), (errors, case)
