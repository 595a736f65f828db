"""Tier: no process. Adaptive instance norm against equation 8 of its paper, written out sample by sample in numpy."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from syncnorm.functional import adaptive_instance_norm
from syncnorm.modules import AdaptiveInstanceNorm


def paper(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    out = np.empty(content.shape)
    for n in range(content.size(0)):
        for c in range(content.size(1)):
            x = content[n, c].double().numpy()
            s = style[n if style.size(0) > 1 else 0, c].double().numpy()
            x_std, s_std = (np.sqrt(np.mean((u - np.mean(u)) ** 2) + eps) for u in (x, s))
            out[n, c] = s_std * (x - np.mean(x)) / x_std + np.mean(s)
    return torch.from_numpy(out)


def pair(content: tuple[int, ...], style: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, s = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in (content, style))
    return (x * 3 - 1).to(dtype), (s * 0.5 + 2).to(dtype)


SHAPES = [
    ((3, 2, 7), (3, 2, 7)),
    ((3, 2, 4, 5), (3, 2, 9, 3)),
    ((3, 2, 4, 5), (1, 2, 3, 3)),
    ((2, 2, 3, 4, 2), (2, 2, 5)),
    ((3, 2, 1, 1), (3, 2, 4, 4)),
    ((3, 2, 4, 4), (3, 2, 1, 1)),
    ((3, 2), (3, 2)),
    ((0, 2, 3, 3), (0, 2, 4, 4)),
]


@pytest.mark.parametrize(("content", "style"), SHAPES, ids=str)
def test_equals_the_paper(content: tuple[int, ...], style: tuple[int, ...]) -> None:
    x, s = pair(content, style)
    torch.testing.assert_close(adaptive_instance_norm(x, s), paper(x, s), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(AdaptiveInstanceNorm(eps=0.1)(x, s), paper(x, s, 0.1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("content", "style"), [*SHAPES[1:3], SHAPES[4]], ids=str)
def test_gradients_are_right_twice(content: tuple[int, ...], style: tuple[int, ...]) -> None:
    x, s = (t[:2, :1].requires_grad_() for t in pair(content, style))
    # A wide eps: the finite differences of a single value's spread would see √(σ² + 1e-5) as a kink.
    assert torch.autograd.gradcheck(lambda x, s: adaptive_instance_norm(x, s, 0.1), (x, s))
    assert torch.autograd.gradgradcheck(lambda x, s: adaptive_instance_norm(x, s, 0.1), (x, s))


def test_content_in_its_own_style_is_unchanged_and_takes_that_of_another() -> None:
    x, s = pair((3, 2, 40), (3, 2, 50))
    torch.testing.assert_close(adaptive_instance_norm(x, x), x, rtol=1e-13, atol=1e-13)
    y = adaptive_instance_norm(x, s, 0.0)
    torch.testing.assert_close(y.mean(2), s.mean(2), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(y.var(2, correction=0), s.var(2, correction=0), rtol=1e-13, atol=1e-13)


def test_a_single_value_becomes_the_mean_of_the_style_with_finite_gradients() -> None:
    x, s = (t.requires_grad_() for t in pair((3, 2, 1, 1), (3, 2, 4, 4), torch.float32))
    y = adaptive_instance_norm(x, s)
    torch.testing.assert_close(y.flatten(), s.mean((2, 3)).flatten())
    dx, ds = torch.autograd.grad(y.pow(3).sum(), (x, s))
    assert float(dx.abs().max()) == 0.0
    assert bool(ds.isfinite().all()) and float(ds.abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x, s = pair((3, 2, 4, 5), (3, 2, 9, 3), dtype)
    x, s = x * 100, s * 100  # squares that float16 cannot hold
    y = adaptive_instance_norm(x, s)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), paper(x, s), rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert adaptive_instance_norm(x, s.float()).dtype == dtype


def test_layout_copies_and_compilation() -> None:
    layer = AdaptiveInstanceNorm(eps=1e-3)
    x, s = pair((3, 2, 4, 4), (3, 2, 9, 3))
    x = x.to(memory_format=torch.channels_last)
    y = layer(x, s)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, paper(x, s, 1e-3), rtol=1e-13, atol=1e-13)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, s), y)
    assert not layer.state_dict() and "eps=0.001" in repr(layer)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, s), y)
    torch.testing.assert_close(torch.export.export(layer.eval(), (x, s)).module()(x, s), y)


def test_bad_input_is_refused() -> None:
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"style must be \[N, C, \*\] with N = 4 \(or 1\) and C = 3 .* got \[4, 5, 2, 2\]"
    ):
        adaptive_instance_norm(x, torch.randn(4, 5, 2, 2))
    with pytest.raises(ValueError, match=r"got \[2, 3, 2, 2\]"):
        adaptive_instance_norm(x, torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"a style without values has no statistics, got \[4, 3, 0, 2\]"):
        adaptive_instance_norm(x, torch.randn(4, 3, 0, 2))
    with pytest.raises(ValueError, match=r"content must be \[N, C, \*\] of at least 2 dims, got \[4\]"):
        adaptive_instance_norm(torch.randn(4), x)
    with pytest.raises(
        TypeError, match=r"style must be floating point, got torch.int64. Convert it, .* style\.float\(\)"
    ):
        adaptive_instance_norm(x, torch.ones(4, 3, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps must not be negative"):
        AdaptiveInstanceNorm(-1.0)
