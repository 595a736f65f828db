"""Tier: no process. Group norm against its formula in numpy, and where torch's own kernel fails."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import syncnorm
from syncnorm.functional import group_norm


def formula(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    y = np.empty_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size]
            y[n, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    return y * weight.reshape(shape) + bias.reshape(shape)


def parts(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64) * 2 + 3
    return x, *torch.randn(2, shape[1], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (3, 6, 1, 7), (2, 6, 3, 1, 2)])
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_the_formula(shape: tuple[int, ...], groups: int) -> None:
    x, weight, bias = parts(*shape)
    want = formula(x.numpy(), groups, weight.numpy(), bias.numpy())
    np.testing.assert_allclose(group_norm(x, groups, weight, bias).numpy(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_both_orders(channels_last: bool) -> None:
    x, weight, bias = parts(2, 4, 3, 2)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
    assert gradcheck(lambda *a: group_norm(a[0], 2, *a[1:]), inputs)
    assert gradgradcheck(lambda *a: group_norm(a[0], 2, *a[1:]), inputs)


def test_one_group_is_layer_norm_and_one_channel_per_group_is_instance_norm() -> None:
    x, _, _ = parts(3, 4, 5, 3)
    torch.testing.assert_close(group_norm(x, 1), functional.layer_norm(x, (4, 5, 3)), rtol=0, atol=1e-13)
    torch.testing.assert_close(group_norm(x, 4), functional.instance_norm(x), rtol=0, atol=1e-13)


def test_invariant_to_shift_and_positive_scale() -> None:
    x, _, _ = parts(2, 4, 3, 3)
    # eps is all that depends on the scale: relative change 1e-5/σ² · ½
    torch.testing.assert_close(group_norm(5 * x - 2, 2, eps=1e-12), group_norm(x, 2, eps=1e-12), rtol=0, atol=1e-10)
    torch.testing.assert_close(group_norm(-x, 2), -group_norm(x, 2), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dims", [4, 5])
def test_channels_last_with_a_large_mean(dtype: torch.dtype, dims: int) -> None:
    torch.manual_seed(0)
    mean = 1000.0 if dtype == torch.float32 else 200.0
    x = (torch.randn(2, 8, *[9] * (dims - 2)) + mean).to(dtype)
    x = x.to(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d).requires_grad_()
    exact = x.detach().double().contiguous().requires_grad_()
    dy = torch.randn(x.shape).to(dtype)
    y, want = group_norm(x, 2), group_norm(exact, 2)
    y.backward(dy)
    want.backward(dy.double())
    # float32: 1000 · 6e-8 in the mean, on values up to 4; half: rounding of the output, 4 · 2^-11
    tolerance = 2e-4 if dtype == torch.float32 else 4e-3
    assert y.movedim(1, -1).is_contiguous() and y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=tolerance)
    if dtype == torch.float32 and dims == 4:  # what it protects from; when torch is mended, aten_rows._recentre can go
        assert (functional.group_norm(x, 2).double() - want).abs().max() > 0.1


def test_a_corner_that_is_not_the_mean_does_no_harm() -> None:
    x = torch.randn(2, 4, 33, 33) * 0.5 + 100
    x[:, :, 16] = 0  # the row whose mean is taken off
    exact = group_norm(x.double(), 2)
    y = group_norm(x.to(memory_format=torch.channels_last), 2)
    # values up to 6, the variance off by 33 rows · 6e-8 · the few units in which float32 sums of 2178 terms err
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=6 * 33 * 6e-8 * 30)


@pytest.mark.parametrize("batch", [1, 2, 0])
def test_one_value_per_group_gives_the_bias(batch: int) -> None:
    x, weight, bias = parts(batch, 4, 1, 1)
    x.requires_grad_()
    y = group_norm(x, 4, weight.requires_grad_(), bias)
    assert torch.equal(y, bias.reshape(1, 4, 1, 1).expand(batch, 4, 1, 1))
    y.sum().backward()
    assert not x.grad.any() and not weight.grad.any()
    assert group_norm(torch.full((1, 4), torch.nan), 4).isnan().all()


def test_module_takes_the_state_of_torchs() -> None:
    theirs, ours = nn.GroupNorm(2, 6), syncnorm.GroupNorm(6, 2)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.backend = "aten"
    assert torch.equal(ours(x), theirs(x)) and isinstance(ours, nn.GroupNorm)
    assert syncnorm.GroupNorm(6, 2, bias=False).bias is None
    assert "affine=True, bias=False" in repr(syncnorm.GroupNorm(6, 2, bias=False))
    assert not list(syncnorm.GroupNorm(6, 2, affine=False).parameters())


def test_half_input_beside_float_parameters() -> None:
    layer = syncnorm.GroupNorm(4, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert layer(torch.randn(2, 4, 3).to(dtype)).dtype == dtype


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"num_groups=32 for 12 channels\. Use one of 1, 2, 3, 4, 6, 12\."):
        syncnorm.GroupNorm(12)
    with pytest.raises(ValueError, match=r"num_groups=0 for 12"):
        syncnorm.GroupNorm(12, 0)
    with pytest.raises(ValueError, match=r"the number of channels comes first, unlike in torch.*GroupNorm\(64, 32\)\."):
        syncnorm.GroupNorm(32, 64)
    layer = syncnorm.GroupNorm(4, 2)
    with pytest.raises(ValueError, match=r"expected 4 channels in dim 1, got an input \[2, 3, 4\]\. The channels seem"):
        layer(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"of at least 2 dims, got \[4\]"):
        layer(torch.randn(4))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        layer(torch.ones(2, 4, dtype=torch.int64))
