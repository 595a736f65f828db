"""Tier: gpu. More than 2^31 elements: offsets no longer fit in 32 bits."""

import pytest
import torch
from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.kernels import triton as kernels
from syncnorm.kernels.triton import rows as row_kernels
from tests.triton_cases import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a CUDA device is needed, the interpreter will not do")

N, C, S = 9, 16, 1 << 24  # 2.4e9 elements, 4.8 GB in bfloat16
RELU = Activation("relu")


def need(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{gigabytes:g} GB of device memory are needed, {free:.0f} are free")


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_batch_primitives(channels_last: bool) -> None:
    need(26)
    shape = (N * S, C) if channels_last else (N, C, S)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(1, 2)

    def channel(t: Tensor, c: int, n: int) -> Tensor:
        """One channel of one sample, as float64."""
        return (t[n * S : (n + 1) * S, c] if channels_last else t[n, c]).double()

    moments = kernels.batch_moments(x)
    assert moments.count == N * S
    rstd = (moments.var + 1e-5).rsqrt()
    weight, bias = torch.rand(2, C, device="cuda") + 0.5
    for c in (0, C - 1):
        parts = [channel(x, c, n) for n in range(N)]
        mean = torch.stack([p.mean() for p in parts]).mean()
        var = torch.stack([(p - mean).square().mean() for p in parts]).mean()
        torch.testing.assert_close(moments.mean[c], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.var[c], var, rtol=1e-6, atol=0)
    y, mask = kernels.batch_normalize(x, moments.mean, rstd, weight, bias, RELU, x)
    assert mask is not None
    sums = kernels.batch_backward_reduce(x, x, moments.mean, rstd, weight, bias, RELU, mask)
    means = sums / moments.count

    def before(c: int, n: int) -> Tensor:
        return (channel(x, c, n) - moments.mean[c]) * rstd[c] * weight[c] + bias[c] + channel(x, c, n)

    for c, n in ((0, 0), (C - 1, N - 1)):
        torch.testing.assert_close(channel(y, c, n), before(c, n).relu(), rtol=2**-8, atol=1e-6)
    del y
    for c in (0, C - 1):
        through = torch.stack([(channel(x, c, n) * (before(c, n) > 0)).sum() for n in range(N)]).sum()
        torch.testing.assert_close(sums[0, c], through, rtol=1e-5, atol=0)
    dx, dr = kernels.batch_backward_input(x, x, moments.mean, rstd, weight, means, bias, RELU, mask, True)
    assert dr is not None
    for c, n in ((0, 0), (C - 1, N - 1)):
        v = channel(x, c, n)
        g = v * (before(c, n) > 0)
        x_hat = (v - moments.mean[c]) * rstd[c]
        exact = rstd[c] * weight[c] * (g - means[0, c] - x_hat * means[1, c])
        torch.testing.assert_close(channel(dx, c, n), exact, rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(channel(dr, c, n), g, rtol=2**-8, atol=0)


def test_row_primitives() -> None:
    need(22)
    M, D = (1 << 20) + 3, 2048
    x = torch.empty(M, D, dtype=torch.bfloat16, device="cuda").normal_(1, 2)
    weight, bias = torch.rand(2, D, device="cuda")
    y, h, mean, rstd = row_kernels.row_norm_forward(x, weight, bias, 1e-5, True, x)
    assert h is not None and mean is not None
    dx, dweight, dbias = row_kernels.row_norm_backward(x, h, weight, mean, rstd, True, True)
    assert dweight is not None and dbias is not None
    for rows in (slice(0, 2), slice(M - 2, M)):
        leaf = (x[rows].double() * 2).requires_grad_()
        exact = torch.nn.functional.layer_norm(leaf, (D,), weight.double(), bias.double())
        (gradient,) = torch.autograd.grad(exact, leaf, x[rows].double())
        torch.testing.assert_close(y[rows].double(), exact.detach(), rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(dx[rows].double(), gradient, rtol=2**-6, atol=2**-7)
    total = torch.zeros(D, dtype=torch.float64, device="cuda")
    for part in x.split(1 << 16):
        total += part.double().sum(0)
    torch.testing.assert_close(dbias.double(), total, rtol=1e-4, atol=1.0)
