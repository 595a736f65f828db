"""Tier: no process. Layer norm, over the last dims and over channels, against its formula in numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import syncnorm
from syncnorm.functional import layer_norm, rms_norm


def formula(x: np.ndarray, axis: tuple[int, ...], eps: float = 1e-5) -> np.ndarray:
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + eps)


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64) * 3 + 2


def test_last_dim_and_last_dims_equal_the_formula() -> None:
    x, weight, bias = sample(3, 4, 5), sample(5), sample(4, 5)
    want = formula(x.numpy(), (-1,)) * weight.numpy() + 1
    np.testing.assert_allclose(layer_norm(x, 5, weight, torch.ones_like(weight)).numpy(), want, rtol=0, atol=1e-13)
    want = formula(x.numpy(), (-2, -1)) + bias.numpy()
    np.testing.assert_allclose(layer_norm(x, (4, 5), None, bias).numpy(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 3, 5), (2, 4, 3, 1, 2)])
@pytest.mark.parametrize("inner", [False, True])
def test_channels_equal_the_formula_in_every_layout(shape: tuple[int, ...], inner: bool) -> None:
    x, weight, bias = sample(*shape), sample(4), sample(4) - 1
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if inner else x
    vector = [1, 4] + [1] * (len(shape) - 2)
    want = formula(x.numpy(), (1,)) * weight.reshape(vector).numpy() + bias.reshape(vector).numpy()
    y = layer_norm(x, 4, weight, bias, channel_dim=1)
    np.testing.assert_allclose(y.numpy(), want, rtol=0, atol=1e-13)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_gradients_of_both_orders(channel_dim: int) -> None:
    x = sample(2, 3, 3).requires_grad_()
    weight, bias = sample(3).requires_grad_(), sample(3).requires_grad_()
    assert gradcheck(lambda *a: layer_norm(a[0], 3, *a[1:], channel_dim=channel_dim), (x, weight, bias))
    assert gradgradcheck(lambda *a: layer_norm(a[0], 3, *a[1:], channel_dim=channel_dim), (x, weight, bias))


def test_is_rms_norm_of_the_centred_input() -> None:
    x = sample(5, 7)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer_norm(x, 7), rms_norm(centred, 7, eps=1e-5), rtol=0, atol=1e-13)


def test_invariant_to_shift_and_positive_scale() -> None:
    x = sample(5, 7)
    torch.testing.assert_close(layer_norm(4 * x + 9, 7, eps=1e-13), layer_norm(x, 7, eps=1e-13), rtol=0, atol=1e-11)


def test_a_network_that_starts_with_it_has_no_derivative_along_its_input() -> None:
    """Euler on a function of degree 0: x·∇f = 0, which holds exactly at eps = 0."""
    x = sample(5, 7).requires_grad_()
    (dx,) = torch.autograd.grad((layer_norm(x, 7, eps=0.0).pow(3) * sample(5, 7)).sum(), x)
    assert (x * dx).sum(-1).abs().max() < 1e-12 * (x * dx).abs().max() * 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_have_float_statistics(dtype: torch.dtype) -> None:
    x = (sample(4, 64) * 300 + 100).to(dtype)  # squares beyond float16
    for channel_dim in (1, -1):
        layer = syncnorm.LayerNorm(64, channel_dim=channel_dim)
        y = layer(x)
        assert y.dtype == dtype
        np.testing.assert_allclose(
            y.detach().double().numpy(), formula(x.double().numpy(), (-1,)), rtol=torch.finfo(dtype).eps, atol=1e-3
        )


def test_a_single_feature_gives_the_bias() -> None:
    assert torch.equal(
        layer_norm(sample(3, 1), 1, None, torch.tensor([2.0], dtype=torch.float64)), sample(3, 1) * 0 + 2
    )


def test_module_takes_the_state_of_torchs() -> None:
    theirs, ours = nn.LayerNorm((3, 5)), syncnorm.LayerNorm((3, 5))
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.backend = "aten"
    assert torch.equal(ours(x), theirs(x)) and isinstance(ours, nn.LayerNorm)
    assert "channel_dim=1" in repr(syncnorm.LayerNorm(4, channel_dim=1))
    assert syncnorm.LayerNorm(4, bias=False).bias is None


def test_errors_say_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"expected 4 features in dim -1, got an input \[2, 4, 3\]\..*use channel_dim=1"
    ):
        syncnorm.LayerNorm(4)(torch.randn(2, 4, 3))
    with pytest.raises(
        ValueError, match=r"expected 4 features in dim 1, got an input \[2, 3, 4\]\..*leave out channel_dim"
    ):
        syncnorm.LayerNorm(4, channel_dim=1)(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"expected \[3, 4\] features in the last dims, got an input \[4\]"):
        syncnorm.LayerNorm((3, 4))(torch.randn(4))
    with pytest.raises(ValueError, match=r"an input with a dim 1, got \[4\]"):
        syncnorm.LayerNorm(4, channel_dim=1)(torch.randn(4))
    with pytest.raises(ValueError, match=r"one number of features, got dim=\[3, 4\].*GroupNorm\(num_channels, 1\)"):
        syncnorm.LayerNorm((3, 4), channel_dim=1)
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        syncnorm.LayerNorm(4)(torch.ones(2, 4, dtype=torch.int64))
