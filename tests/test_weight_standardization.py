"""Tier: no process. Weight standardisation against its formula in numpy, as layers and as a parametrization."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.nn.utils import parametrize

import syncnorm
from syncnorm.functional import weight_standardization
from syncnorm.modules import (
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
)
from syncnorm.modules import weight_standardization as standardize_layer


def formula(w: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    axes = tuple(range(1, w.ndim))
    return (w - w.mean(axes, keepdims=True)) / np.sqrt(w.var(axes, keepdims=True) + eps)


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(6)
    return torch.randn(*shape, dtype=torch.float64) * 0.1 + 0.05


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4), (3, 2, 3, 3), (2, 1, 2, 1, 3)])
def test_equals_the_formula_and_each_filter_is_standard(shape: tuple[int, ...]) -> None:
    weight = sample(*shape)
    got = weight_standardization(weight)
    np.testing.assert_allclose(got.numpy(), formula(weight.numpy()), rtol=0, atol=1e-12)
    assert got.flatten(1).sum(1).abs().max() < 1e-12  # rows sum to 0
    variance = weight.flatten(1).var(1, correction=0)
    torch.testing.assert_close(got.flatten(1).square().mean(1), variance / (variance + 1e-5), rtol=0, atol=1e-12)


def test_gradients_of_both_orders_sum_to_zero_per_filter() -> None:
    weight = sample(3, 2, 3).requires_grad_()
    assert gradcheck(weight_standardization, (weight,))
    assert gradgradcheck(weight_standardization, (weight,))
    (dw,) = torch.autograd.grad((weight_standardization(weight) * sample(3, 2, 3).sin()).sum(), weight)
    assert dw.flatten(1).sum(1).abs().max() < 1e-11


def test_invariant_to_shift_and_positive_scale_of_filters() -> None:
    weight = sample(3, 4, 3)
    scale, shift = torch.tensor([2.0, 0.1, 30.0]).double().reshape(3, 1, 1), 0.7
    moved = weight_standardization(weight * scale + shift, eps=1e-15)
    torch.testing.assert_close(moved, weight_standardization(weight, eps=1e-15), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("ours", "conv", "shape"),
    [
        (WeightStandardizedConv1d, functional.conv1d, (2, 4, 7)),
        (WeightStandardizedConv2d, functional.conv2d, (2, 4, 7, 5)),
        (WeightStandardizedConv3d, functional.conv3d, (2, 4, 4, 3, 5)),
    ],
)
def test_layer_is_a_convolution_with_the_standardised_weight(
    ours: type[nn.Module], conv: object, shape: tuple[int, ...]
) -> None:
    x = sample(*shape)
    layer = ours(4, 6, 3, stride=2, padding=1, groups=2, eps=1e-4, dtype=torch.float64)
    weight = torch.from_numpy(formula(layer.weight.detach().numpy(), 1e-4))
    want = conv(x, weight, layer.bias, stride=2, padding=1, groups=2)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)
    assert list(layer.state_dict()) == ["weight", "bias"] and "eps=0.0001" in repr(layer)


def test_padding_modes_are_the_convolutions_own() -> None:
    layer = WeightStandardizedConv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False)
    x = torch.randn(1, 2, 4, 4)
    want = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="circular"), weight_standardization(layer.weight))
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_have_float_statistics(dtype: torch.dtype) -> None:
    weight = sample(4, 3, 3, 3).to(dtype)
    got = weight_standardization(weight)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), formula(weight.double().numpy()), rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Conv1d(4, 4, 3, groups=4)])
def test_parametrization_comes_and_goes(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    original = layer.weight
    before = original.detach().clone()
    assert standardize_layer(layer) is layer
    np.testing.assert_allclose(
        layer.weight.detach().double().numpy(), formula(before.double().numpy()), rtol=0, atol=1e-5
    )
    assert layer.parametrizations.weight.original is original and torch.equal(original, before)
    layer.weight.sum().backward()
    assert original.grad is not None
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(layer.weight, before)


def test_top_level_name() -> None:
    assert syncnorm.WeightStandardizedConv2d is WeightStandardizedConv2d


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"at least 2 values per filter, got \[4, 1, 1, 1\].*depthwise 1×1"):
        WeightStandardizedConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"at least 2 values per filter, got \[4, 1\]"):
        standardize_layer(nn.Linear(1, 4))
    with pytest.raises(TypeError, match=r"Conv1d, Conv2d, Conv3d or Linear, .*got ConvTranspose2d"):
        standardize_layer(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"Linear has no tensor 'kernel' to standardise"):
        standardize_layer(nn.Linear(3, 4), name="kernel")
    with pytest.raises(ValueError, match=r"eps must be positive, got 0"):
        WeightStandardizedConv2d(3, 4, 3, eps=0)
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        weight_standardization(torch.ones(2, 3, dtype=torch.int64))
