"""Tier: no process. Dynamic tanh against its formula in numpy."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import syncnorm
from syncnorm.functional import dynamic_tanh


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(9)
    return torch.randn(*shape, dtype=torch.float64) * 2


@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 4), -1), ((2, 3, 4), -1), ((2, 4, 3), 1), ((2, 4, 3, 3), 1)])
def test_equals_the_formula(shape: tuple[int, ...], channel_dim: int) -> None:
    x, alpha, weight, bias = sample(*shape), sample(1), sample(4), sample(4) + 1
    vector = [1] * len(shape)
    vector[channel_dim] = 4
    want = np.tanh(alpha.numpy() * x.numpy()) * weight.numpy().reshape(vector) + bias.numpy().reshape(vector)
    y = dynamic_tanh(x, alpha, weight, bias, channel_dim=channel_dim)
    np.testing.assert_allclose(y.numpy(), want, rtol=0, atol=1e-13)
    assert y.stride() == x.stride()


def test_gradients_of_both_orders_and_that_of_alpha() -> None:
    inputs = tuple(t.requires_grad_() for t in (sample(2, 3, 4), sample(1), sample(4), sample(4) + 1))
    assert gradcheck(dynamic_tanh, inputs)
    assert gradgradcheck(dynamic_tanh, inputs)
    x, alpha = inputs[:2]
    (got,) = torch.autograd.grad(dynamic_tanh(x, alpha).sum(), alpha)
    array = x.detach().numpy()
    want = ((1 - np.tanh(alpha.item() * array) ** 2) * array).sum()  # dα = Σ u(1 − t²)x
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    x = sample(64, 4).to(dtype)
    y = syncnorm.DynamicTanh(4, alpha=0.3)(x)
    assert y.dtype == dtype
    want = np.tanh(np.float32(0.3) * x.double().numpy())
    np.testing.assert_allclose(y.detach().double().numpy(), want, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-7)


def test_module_state() -> None:
    layer = syncnorm.DynamicTanh(4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "alpha": (1,),
        "weight": (4,),
        "bias": (4,),
    }
    assert layer.alpha.item() == 0.5
    bare = syncnorm.DynamicTanh(4, elementwise_affine=False, channel_dim=1)
    assert [name for name, _ in bare.named_parameters()] == ["alpha"]
    assert repr(bare) == "DynamicTanh(4, elementwise_affine=False, channel_dim=1)"


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"expected 4 features in dim -1, got an input \[2, 4, 3\]\. channel_dim says"):
        syncnorm.DynamicTanh(4)(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match=r"alpha of one element, got \[4\]"):
        dynamic_tanh(torch.randn(2, 4), torch.ones(4))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        syncnorm.DynamicTanh(4)(torch.ones(2, 4, dtype=torch.int64))
