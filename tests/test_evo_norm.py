"""Tier: no process. EvoNorm-S0 against its formula in numpy."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from syncnorm.functional import evo_norm_s0
from syncnorm.modules import EvoNormS0


def formula(
    x: np.ndarray, groups: int, v: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5
) -> np.ndarray:
    y, size = np.empty_like(x), x.shape[1] // groups
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            first = c // size * size
            std = np.sqrt(x[n, first : first + size].var() + eps)
            y[n, c] = x[n, c] / (1 + np.exp(-v[c] * x[n, c])) / std * weight[c] + bias[c]
    return y


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(8)
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (3, 6, 4, 1), (1, 6, 2, 3, 2)])
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_the_formula(shape: tuple[int, ...], groups: int) -> None:
    x, vectors = sample(*shape), sample(3, 6) - 1
    want = formula(x.numpy(), groups, *vectors.numpy())
    np.testing.assert_allclose(evo_norm_s0(x, groups, *vectors).numpy(), want, rtol=1e-13, atol=1e-13)


def test_gradients_of_both_orders() -> None:
    inputs = tuple(t.requires_grad_() for t in (sample(2, 4, 3), *sample(3, 4)))
    assert gradcheck(lambda x, *vectors: evo_norm_s0(x, 2, *vectors), inputs)
    assert gradgradcheck(lambda x, *vectors: evo_norm_s0(x, 2, *vectors), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_at_300_whose_square_is_beyond_float16(dtype: torch.dtype) -> None:
    x = (sample(2, 6, 5, 5) * 300).to(dtype)
    layer = EvoNormS0(6, 2)
    y = layer(x)
    vectors = [p.detach().double().numpy() for p in (layer.v, layer.weight, layer.bias)]
    assert y.dtype == dtype
    with np.errstate(over="ignore"):  # exp of a large number: the gate is shut
        want = formula(x.double().numpy(), 2, *vectors)
    np.testing.assert_allclose(y.detach().double().numpy(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_layout_is_kept_and_does_not_matter() -> None:
    x, vectors = sample(2, 6, 3, 4), sample(3, 6)
    inner = x.contiguous(memory_format=torch.channels_last)
    y = evo_norm_s0(inner, 3, *vectors)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, evo_norm_s0(x, 3, *vectors), rtol=0, atol=1e-13)


def test_one_value_per_group_is_finite() -> None:
    x = sample(2, 6, 1, 1).requires_grad_()
    layer = EvoNormS0(6, 6).double()
    y = layer(x)
    torch.testing.assert_close(y, x.detach() * x.detach().sigmoid() / 1e-5**0.5, rtol=1e-12, atol=0)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_starts_as_swish_over_the_standard_deviation_and_keeps_its_state() -> None:
    assert sorted(EvoNormS0(4, 2).state_dict()) == ["bias", "v", "weight"]
    assert repr(EvoNormS0(64)) == "EvoNormS0(64, num_groups=32, eps=1e-05)"


def test_errors_say_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"EvoNormS0: num_groups must divide.*num_groups=32 for 6 .*Use one of 1, 2, 3, 6\."
    ):
        EvoNormS0(6)
    with pytest.raises(ValueError, match=r"evo_norm_s0: expected 4 channels in dim 1, got an input \[2, 3\]"):
        EvoNormS0(4, 2)(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        EvoNormS0(4, 2)(torch.ones(2, 4, dtype=torch.int64))
