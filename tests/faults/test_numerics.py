"""Tier: no process (ranks are threads). Inputs at which other ways to a variance fail."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncnorm
from syncnorm.kernels import native
from tests.threads import ThreadRanks, thread_ranks

RANKS, SAMPLES = 4, 4096
NATIVE = native.objection(torch.zeros(1, 1))

# Mean and deviation.
INPUTS: dict[str, tuple[float, float, torch.dtype]] = {
    "N(0, 1)": (0.0, 1.0, torch.float32),
    "mean 1e2, std 1e-2": (1e2, 1e-2, torch.float32),
    "mean 1e4, std 1": (1e4, 1.0, torch.float32),
    "mean 1e4, std 1e-2": (1e4, 1e-2, torch.float32),
    "mean 1e6, std 1": (1e6, 1.0, torch.float32),
    "mean 1, std 1e-5": (1.0, 1e-5, torch.float32),
    "constant 0.1": (0.1, 0.0, torch.float32),
    "constant 1e6": (1e6, 0.0, torch.float32),
    "std 1e-15": (0.0, 1e-15, torch.float32),
    "std 1e-23, whose square is none in float32": (0.0, 1e-23, torch.float32),
    "std 1e15": (0.0, 1e15, torch.float32),
    "float64, std 1e-23": (0.0, 1e-23, torch.float64),
    "float64, std 1e120": (0.0, 1e120, torch.float64),
    "float16, mean 6e4, std 10": (6e4, 10.0, torch.float16),
    "bfloat16, mean 100": (100.0, 1.0, torch.bfloat16),
    "float64, mean 1e6, std 1": (1e6, 1.0, torch.float64),
}


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], ThreadRanks]]:
    with thread_ranks() as source:
        yield source


def one_rank(shards: list[Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    layer = syncnorm.SyncBatchNorm1d(3, momentum=1.0, dtype=torch.float64, affine=False, backend=backend)
    y = layer(shards[dist.get_rank()])
    return y, layer.running_mean, layer.running_var


# Native kernels keep the mean in float64; torch's operators, which run everywhere, in float32.
@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=pytest.mark.skipif(bool(NATIVE), reason=str(NATIVE))), "aten"]
)
@pytest.mark.parametrize("name", INPUTS)
def test_hard_inputs(pools: Callable[[int], ThreadRanks], name: str, backend: str) -> None:
    mean, std, dtype = INPUTS[name]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(RANKS * SAMPLES, 3, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
    found = pools(RANKS).run(one_rank, list(x.chunk(RANKS)), backend)
    exact = x.double()
    var, mu = torch.var_mean(exact, 0, correction=1)
    rstd = (var * (len(x) - 1) / len(x) + 1e-5).rsqrt()
    y, running_mean, running_var = torch.cat([f[0] for f in found]).double(), found[0][1], found[0][2]
    inner = 2.0**-53 if backend == "native" or dtype == torch.float64 else 2.0**-24
    # A product x·rstd, or the mean itself, rounded: a constant is off by as much.
    centre = 4 * inner * float((mu.abs() * rstd).max())
    assert y.isfinite().all() and bool((running_var >= 0).all())
    if std == 0:
        assert running_var.tolist() == [0, 0, 0] and float(y.abs().max()) <= centre
        return
    # Runs of up to 4096 float32 values are summed in float32, and sums of squares over the wire lose 2^-53·(mean/std)² of the
    # variance (docs/mathematics.md); a float32 square has no digits below 1e-38.
    kappa = float((mu.abs() / var.sqrt()).max())
    relative = (1e-6 if backend == "native" else 4e-5) + 16 * 2.0**-53 * kappa**2
    smallest = torch.finfo(torch.float32).tiny if dtype != torch.float64 else 0.0
    torch.testing.assert_close(running_var, var, rtol=relative, atol=smallest)
    torch.testing.assert_close(running_mean, mu, rtol=1e-6, atol=1e-6 * float(var.sqrt().max()))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y, (exact - mu) * rstd, rtol=2 * rounding + relative, atol=4 * rounding + centre)


def too_large(shards: list[Tensor], policy: str) -> tuple[str, Tensor]:
    layer = syncnorm.SyncBatchNorm1d(3, on_nonfinite=policy)
    try:
        layer(shards[dist.get_rank()])
    except syncnorm.SyncNormNonFinite as error:
        return str(error), layer.running_var
    return "", layer.running_var


def test_values_whose_squares_leave_float32_are_named_where_asked(pools: Callable[[int], ThreadRanks]) -> None:
    # Their variance has no place in a float32 buffer either: without a policy it is not finite, as torch's is.
    x = torch.full((RANKS * 4, 3), 1.0)
    x[5, 2] = 1e20  # on rank 1
    torchs = torch.nn.BatchNorm1d(3)
    torchs(x)
    assert not torchs.running_var.isfinite()[2]
    for text, running_var in pools(RANKS).run(too_large, list(x.chunk(RANKS)), "raise"):
        assert "rank 1: channels [2]" in text and "values beyond 1e18" in text and running_var.tolist() == [1, 1, 1]
    for text, running_var in pools(RANKS).run(too_large, list(x.chunk(RANKS)), "skip_update"):
        assert text == "" and running_var.isfinite().all()
