"""Tier: no process. RMS norm, whole and partial, against its formula in numpy."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import syncnorm
from syncnorm.functional import rms_norm


def formula(x: np.ndarray, eps: float, num_used: int | None = None) -> np.ndarray:
    return x / np.sqrt((x[..., :num_used] ** 2).mean(-1, keepdims=True) + eps)


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize(("p", "num_used"), [(1.0, None), (0.3, 2), (0.01, 1), (0.99, 6)])
def test_equals_the_formula(p: float, num_used: int | None) -> None:
    x, weight = sample(3, 4, 7), sample(7)
    want = formula(x.numpy(), 1e-5, num_used) * weight.numpy()
    np.testing.assert_allclose(rms_norm(x, 7, weight, 1e-5, p=p).numpy(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_channels_and_several_dims(p: float) -> None:
    x, weight = sample(2, 6, 3, 4), sample(6)
    want = formula(x.numpy().swapaxes(1, -1), 1e-5, int(6 * p)).swapaxes(1, -1) * weight.reshape(6, 1, 1).numpy()
    for layout in (torch.contiguous_format, torch.channels_last):
        y = rms_norm(x.contiguous(memory_format=layout), 6, weight, 1e-5, p=p, channel_dim=1)
        np.testing.assert_allclose(y.numpy(), want, rtol=0, atol=1e-13)
        assert y.is_contiguous(memory_format=layout)
    flat = formula(x.flatten(2).numpy(), 1e-5, int(12 * p)).reshape(x.shape)
    np.testing.assert_allclose(rms_norm(x, (3, 4), None, 1e-5, p=p).numpy(), flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_gradients_of_both_orders(p: float) -> None:
    inputs = sample(2, 3, 4).requires_grad_(), sample(4).requires_grad_()
    assert gradcheck(lambda x, w: rms_norm(x, 4, w, 1e-3, p=p), inputs)
    assert gradgradcheck(lambda x, w: rms_norm(x, 4, w, 1e-3, p=p), inputs)


def test_input_gradient_of_the_partial_form_equals_its_formula() -> None:
    """dx_i = r·u_i − 1[i<k]·x_i·(r³/k)·Σ_j u_j·x_j."""
    x, u, k = sample(5, 8).requires_grad_(), sample(8, 5).T, 3
    (dx,) = torch.autograd.grad(rms_norm(x, 8, None, 1e-4, p=k / 8), x, u)
    x_, u_ = x.detach().numpy(), u.numpy()
    r = 1 / np.sqrt((x_[:, :k] ** 2).mean(1, keepdims=True) + 1e-4)
    want = r * u_ - (np.arange(8) < k) * x_ * r**3 / k * (u_ * x_).sum(1, keepdims=True)
    np.testing.assert_allclose(dx.numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1.0, 0.25])
def test_scaling_leaves_the_sign(p: float) -> None:
    x = sample(5, 8)
    for c in (-3.0, 0.2):
        got = rms_norm(c * x, 8, eps=1e-14, p=p)
        torch.testing.assert_close(got, np.sign(c) * rms_norm(x, 8, eps=1e-14, p=p), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_default_eps_is_the_precision_of_the_statistics(dtype: torch.dtype) -> None:
    x = torch.full((1, 4), 2.0**-12).to(dtype)
    eps = np.finfo(np.float64 if dtype == torch.float64 else np.float32).eps
    y = rms_norm(x, 4)
    np.testing.assert_allclose(y.double().numpy(), formula(x.double().numpy(), eps), rtol=torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_half_inputs_have_float_statistics_and_draw_no_warning(dtype: torch.dtype, p: float) -> None:
    x = (sample(4, 64) * 300).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns that a float weight keeps it from its fused kernel
        y = syncnorm.RMSNorm(64, p=p)(x)
    assert y.dtype == dtype
    want = formula(x.double().numpy(), 0.0, int(64 * p))
    np.testing.assert_allclose(y.detach().double().numpy(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_module_takes_the_state_of_torchs() -> None:
    theirs, ours = nn.RMSNorm(5), syncnorm.RMSNorm(5)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, nn.RMSNorm) and "p=0.5, channel_dim=1" in repr(syncnorm.RMSNorm(4, p=0.5, channel_dim=1))


def test_errors_say_what_to_do() -> None:
    for p in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=rf"in \(0, 1\]; got {p}"):
            syncnorm.RMSNorm(4, p=p)
    with pytest.raises(ValueError, match=r"rms_norm: expected 4 features in dim -1, got an input \[2, 3\]"):
        syncnorm.RMSNorm(4)(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"Give dim as an int, or leave out channel_dim"):
        syncnorm.RMSNorm((3, 4), channel_dim=1)
