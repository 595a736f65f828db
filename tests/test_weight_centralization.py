"""Tier: no process. Weight centralisation against its formula in numpy, as layers and as a parametrization."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.nn.utils import parametrize

from syncnorm.functional import weight_centralization
from syncnorm.modules import WeightCentralizedConv1d, WeightCentralizedConv2d, WeightCentralizedConv3d
from syncnorm.modules import weight_centralization as centralize_layer


def formula(w: np.ndarray) -> np.ndarray:
    return w - w.mean(tuple(range(1, w.ndim)), keepdims=True)


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(6)
    return torch.randn(*shape, dtype=torch.float64) * 0.1 + 0.05


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4), (3, 2, 3, 3), (2, 1, 2, 1, 3)])
def test_equals_the_formula_to_the_second_derivative(shape: tuple[int, ...]) -> None:
    weight = sample(*shape).requires_grad_()
    got = weight_centralization(weight)
    np.testing.assert_allclose(got.detach().numpy(), formula(weight.detach().numpy()), rtol=0, atol=1e-15)
    assert got.flatten(1).sum(1).abs().max() < 1e-14
    assert gradcheck(weight_centralization, (weight,)) and gradgradcheck(weight_centralization, (weight,))


@pytest.mark.parametrize(
    ("ours", "conv", "shape"),
    [
        (WeightCentralizedConv1d, functional.conv1d, (2, 4, 7)),
        (WeightCentralizedConv2d, functional.conv2d, (2, 4, 7, 5)),
        (WeightCentralizedConv3d, functional.conv3d, (2, 4, 4, 3, 5)),
    ],
)
def test_layer_is_a_convolution_with_the_centred_weight(
    ours: type[nn.Module], conv: object, shape: tuple[int, ...]
) -> None:
    x = sample(*shape)
    layer = ours(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64)
    weight = torch.from_numpy(formula(layer.weight.detach().numpy()))
    torch.testing.assert_close(layer(x), conv(x, weight, layer.bias, stride=2, padding=1, groups=2), rtol=0, atol=1e-12)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_what_the_inputs_have_in_common_adds_nothing() -> None:
    layer, x = WeightCentralizedConv2d(3, 5, 3, dtype=torch.float64), sample(2, 3, 6, 6)
    torch.testing.assert_close(layer(x + 7), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_have_float_means(dtype: torch.dtype) -> None:
    weight = (sample(4, 3, 3, 3) + 8).to(dtype)
    got = weight_centralization(weight)
    assert got.dtype == dtype
    # The difference is rounded once, and its float32 mean near 8 is off by a few 2^-21.
    np.testing.assert_allclose(
        got.double().numpy(), formula(weight.double().numpy()), rtol=torch.finfo(dtype).eps, atol=2e-6
    )


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Conv1d(4, 4, 3, groups=4)])
def test_parametrization_comes_and_goes(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    original = layer.weight
    before = original.detach().clone()
    assert centralize_layer(layer) is layer
    np.testing.assert_allclose(layer.weight.detach().numpy(), formula(before.numpy()), rtol=0, atol=1e-6)
    assert layer.parametrizations.weight.original is original and torch.equal(original, before)
    layer.weight.square().sum().backward()
    assert original.grad is not None
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(layer.weight, before)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"at least 2 values per filter, got \[4, 1, 1, 1\]: centred, .*depthwise 1×1"):
        WeightCentralizedConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"at least 2 values per filter, got \[4, 1\]"):
        centralize_layer(nn.Linear(1, 4))
    with pytest.raises(TypeError, match=r"weight_centralization takes a Conv1d, .*got ConvTranspose2d"):
        centralize_layer(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"Linear has no tensor 'kernel' to centre"):
        centralize_layer(nn.Linear(3, 4), name="kernel")
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        weight_centralization(torch.ones(2, 3, dtype=torch.int64))
