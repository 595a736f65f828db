"""Tier: no process. Filter response norm and its activation against their formulas in numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import syncnorm
from syncnorm.functional import filter_response_norm, rms_norm, thresholded_linear_unit
from syncnorm.modules import TLU


def formula(x: np.ndarray, eps: float) -> np.ndarray:
    axes = tuple(range(2, x.ndim))
    nu2 = (x**2).mean(axes, keepdims=True) if axes else x**2
    return x / np.sqrt(nu2 + eps)


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 3, 1), (2, 4, 1, 1), (1, 4, 2, 3, 2)])
@pytest.mark.parametrize("learned", [None, -0.3])
def test_equals_the_formula(shape: tuple[int, ...], learned: float | None) -> None:
    x, weight, bias = sample(*shape), sample(4), sample(4) - 2
    vector = [1, 4] + [1] * (len(shape) - 2)
    eps = 1e-3 + abs(learned or 0)
    want = formula(x.numpy(), eps) * weight.numpy().reshape(vector) + bias.numpy().reshape(vector)
    learned_eps = None if learned is None else torch.tensor([learned], dtype=torch.float64)
    y = filter_response_norm(x, weight, bias, 1e-3, learned_eps=learned_eps)
    np.testing.assert_allclose(y.numpy(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_gradients_of_both_orders(shape: tuple[int, ...]) -> None:
    learned = torch.tensor([0.1], dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (sample(*shape), sample(3), sample(3) - 1, learned))

    def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return filter_response_norm(x, w, b, learned_eps=e)

    assert gradcheck(norm, inputs)
    assert gradgradcheck(norm, inputs)


def test_is_rms_norm_over_space() -> None:
    x = sample(2, 3, 4, 5)
    torch.testing.assert_close(filter_response_norm(x), rms_norm(x, (4, 5), eps=1e-6), rtol=0, atol=1e-13)


def test_scaling_leaves_the_sign() -> None:
    x = sample(2, 3, 4)
    torch.testing.assert_close(
        filter_response_norm(-3 * x, eps=1e-14), -filter_response_norm(x, eps=1e-14), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_at_300_whose_square_is_beyond_float16(dtype: torch.dtype) -> None:
    x = (sample(2, 4, 6, 6).sign() * 300).to(dtype).requires_grad_()
    y = syncnorm.FilterResponseNorm(4)(x)
    assert y.dtype == dtype and torch.equal(y.double(), x.detach().double().sign())
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_learned_eps_keeps_a_signal_without_spatial_extent() -> None:
    x = torch.linspace(-0.02, 0.02, 9).reshape(9, 1, 1, 1)
    plain, learned = syncnorm.FilterResponseNorm(1), syncnorm.FilterResponseNorm(1, learnable_eps=True)
    assert plain(x)[1:4].abs().min() > 0.9  # but a sign
    assert learned(x).abs().max() < 0.9 and learned(x).flatten().diff().min() > 0.05
    learned(x).square().sum().backward()
    assert learned.learned_eps.grad.item() < 0  # more ε, smaller outputs
    assert sorted(learned.state_dict()) == ["bias", "learned_eps", "weight"] and "learnable_eps=True" in repr(learned)


def test_layout_is_kept() -> None:
    x = sample(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    y = TLU(4, dtype=torch.float64)(filter_response_norm(x, sample(4), sample(4)))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        filter_response_norm(x, sample(4)), filter_response_norm(x.contiguous(), sample(4)), rtol=0, atol=1e-13
    )


def test_tlu_is_the_larger_of_input_and_threshold() -> None:
    x, threshold = sample(2, 3, 4).requires_grad_(), sample(3).requires_grad_()
    want = np.maximum(x.detach().numpy(), threshold.detach().numpy().reshape(1, 3, 1))
    np.testing.assert_array_equal(thresholded_linear_unit(x, threshold).detach().numpy(), want)
    assert gradcheck(thresholded_linear_unit, (x, threshold))
    layer, y = TLU(3), torch.randn(2, 3)
    assert torch.equal(layer(y), torch.relu(y))
    assert layer(y.half()).dtype == torch.float16


def test_tlu_inside_is_tlu_behind() -> None:
    inside, norm, behind = syncnorm.FilterResponseNorm(3, tlu=True), syncnorm.FilterResponseNorm(3), TLU(3)
    with torch.no_grad():
        for threshold in (inside.threshold, behind.threshold):
            threshold.copy_(torch.tensor([-0.5, 0.0, 0.5]))
    x = torch.randn(2, 3, 4)
    assert torch.equal(inside(x), behind(norm(x)))
    assert sorted(inside.state_dict()) == ["bias", "threshold", "weight"] and "tlu=True" in repr(inside)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"eps must be positive, got 0\. The paper uses 1e-6"):
        syncnorm.FilterResponseNorm(4, eps=0)
    with pytest.raises(ValueError, match=r"filter_response_norm: expected 4 channels in dim 1, got an input \[2, 3\]"):
        syncnorm.FilterResponseNorm(4)(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"thresholded_linear_unit: expected 4 channels in dim 1"):
        nn.Sequential(TLU(4))(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        syncnorm.FilterResponseNorm(4)(torch.ones(2, 4, dtype=torch.int64))
