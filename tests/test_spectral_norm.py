"""Tier: no process. Spectral norm against numpy's singular values: of the matrix, and of a convolution written out densely."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, parametrize

import syncnorm
from syncnorm.functional import spectral_norm as normalize
from syncnorm.functional._spectral_norm import ConvolutionMap

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (7,)),
    "2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (5, 4)),
    "strided, dilated, grouped": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), (5, 6)),
    "same, uneven": (lambda: nn.Conv2d(2, 2, (2, 4), padding="same"), (4, 5)),
    "3d": (lambda: nn.Conv3d(1, 2, 2), (3, 2, 3)),
}


def make(build: object) -> nn.Module:
    torch.manual_seed(17)
    return build().double()


def dense(conv: nn.Module, size: tuple[int, ...]) -> np.ndarray:
    """The matrix of a convolution without its bias, column by column."""
    inputs = conv.in_channels * int(np.prod(size))
    with torch.no_grad():
        basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, conv.in_channels, *size)
        return conv._conv_forward(basis, conv.weight, None).flatten(1).T.numpy()


def largest(matrix: np.ndarray) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False)[0])


@pytest.mark.parametrize(
    "layer", [nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Embedding(6, 3), nn.ConvTranspose1d(3, 4, 2)]
)
def test_matrix_norm_is_numpys(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).double()
    weight = layer.weight.detach().clone()
    matrix = weight.movedim(1, 0) if isinstance(layer, nn.ConvTranspose1d) else weight
    want = weight / largest(matrix.flatten(1).numpy())
    torch.manual_seed(0)
    assert syncnorm.spectral_norm(layer, n_power_iterations=200) is layer
    torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_operator_norm_is_that_of_the_dense_matrix(case: str) -> None:
    build, size = CONVOLUTIONS[case]
    conv = make(build)
    before, weight = largest(dense(conv, size)), conv.weight.detach().clone()
    torch.manual_seed(0)
    syncnorm.spectral_norm(conv, n_power_iterations=1000, norm="operator", input_shape=size)
    conv(torch.randn(1, conv.in_channels, *size).double())
    conv.eval()
    torch.testing.assert_close(conv.weight.detach(), weight / before, rtol=1e-7, atol=0)
    assert largest(dense(conv, size)) == pytest.approx(1, rel=1e-7)
    smaller = tuple(max(n - 1, 1) for n in size)
    if "strided" not in case and case != "3d":
        assert largest(dense(conv, smaller)) <= 1 + 1e-7


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_adjoint_is_the_transpose(case: str) -> None:
    build, size = CONVOLUTIONS[case]
    conv = make(build)
    matrix = dense(conv, size)
    syncnorm.spectral_norm(conv, norm="operator", input_shape=size)
    parts = conv.parametrizations.weight
    mapping: ConvolutionMap = parts[0].linear_map
    u = torch.randn(parts[0]._u.shape, dtype=torch.float64)
    got = mapping.adjoint(parts.original, u).flatten().detach().numpy()
    np.testing.assert_allclose(got, matrix.T @ u.flatten().numpy(), rtol=0, atol=1e-13)


def test_the_matrix_norm_does_not_bound_a_convolution() -> None:
    """Why there is an operator norm."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    conv.weight.data.fill_(1.0)
    syncnorm.spectral_norm(conv, n_power_iterations=50)
    assert largest(dense(conv, (12, 12))) > 2.5  # tends to 3, the root of 9 kernel elements


def test_few_iterations_estimate_from_below_and_settle() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 30)))
    exact = largest(weight.numpy())
    u, v = torch.ones(20).double() / 20**0.5, torch.ones(30).double() / 30**0.5
    estimates = []
    for _ in range(60):
        normalised, u, v = normalize(weight, u, v, 1)
        estimates.append(float(weight[0, 0] / normalised[0, 0]))
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(estimates))
    assert estimates[-1] <= exact * (1 + 1e-12)
    assert estimates[-1] == pytest.approx(exact, rel=1e-3)


def test_matrix_norm_is_torchs_step_by_step() -> None:
    torch.manual_seed(18)
    layer = nn.Linear(6, 4).double()
    theirs, ours = parametrizations.spectral_norm(copy.deepcopy(layer)), syncnorm.spectral_norm(copy.deepcopy(layer))
    ours.load_state_dict(theirs.state_dict())  # same keys, same shapes
    x = torch.randn(3, 6).double()
    for _ in range(3):
        results = []
        for each in (ours, theirs):
            each.zero_grad()
            y = each(x)
            y.square().sum().backward()
            results.append((y.detach(), each.parametrizations.weight.original.grad.clone()))
        for mine, exact in zip(*results, strict=True):
            torch.testing.assert_close(mine, exact, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-13)


def test_gradients_of_both_orders() -> None:
    torch.manual_seed(19)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    u, v = torch.randn(3).double(), torch.randn(4).double()
    assert gradcheck(lambda w: normalize(w, u, v, 0)[0], (weight,))
    assert gradgradcheck(lambda w: normalize(w, u, v, 0)[0], (weight,))
    kernel = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    mapping = ConvolutionMap(1, (3, 3), (1, 1), (1, 0, 0, 1), (1, 1))
    u, v = torch.randn(1, 2, 3, 3).double(), torch.randn(1, 1, 3, 3).double()
    assert gradcheck(lambda w: normalize(w, u, v, 0, mapping)[0], (kernel,))
    assert gradgradcheck(lambda w: normalize(w, u, v, 0, mapping)[0], (kernel,))


def test_settled_gradient_is_that_of_the_singular_value() -> None:
    torch.manual_seed(20)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    u, v = torch.randn(4).double(), torch.randn(5).double()
    target = torch.randn(4, 5).double()
    (got,) = torch.autograd.grad((normalize(weight, u, v, 2000)[0] * target).sum(), weight)
    w = weight.detach().numpy()
    left, sigma, right = np.linalg.svd(w)
    t = target.numpy()
    want = t / sigma[0] - (t * w).sum() / sigma[0] ** 2 * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-9)


def test_evaluation_is_a_pure_function_and_training_moves_the_vectors() -> None:
    torch.manual_seed(21)
    layer = syncnorm.spectral_norm(nn.Linear(30, 30))
    x = torch.randn(2, 30)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_two_uses_before_one_backward() -> None:
    layer = syncnorm.spectral_norm(nn.Linear(6, 1))
    (layer(torch.randn(4, 6)).mean() - layer(torch.randn(4, 6)).mean()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_zero_vector_and_half_weights() -> None:
    zero = nn.Linear(3, 2)
    nn.init.zeros_(zero.weight)
    assert not syncnorm.spectral_norm(zero).weight.any()
    vector = syncnorm.spectral_norm(nn.LayerNorm(4), n_power_iterations=2)
    torch.testing.assert_close(vector.weight.detach().norm(), torch.tensor(1.0))
    half = syncnorm.spectral_norm(nn.Linear(64, 64).half(), n_power_iterations=50)
    assert half.weight.dtype == torch.float16 and half.parametrizations.weight[0]._u.dtype == torch.float32
    assert largest(half.weight.detach().double().numpy()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("norm", ["matrix", "operator"])
def test_autocast_does_not_make_it_coarse(norm: str) -> None:
    torch.manual_seed(0)
    settings = {"input_shape": (6, 6)} if norm == "operator" else {}
    ours, cast = (syncnorm.spectral_norm(nn.Conv2d(3, 8, 3), norm=norm, **settings) for _ in range(2))
    cast.load_state_dict(ours.state_dict())
    want = ours.weight
    with torch.autocast("cpu", torch.bfloat16):
        got = cast.weight
    assert got.dtype == torch.float32 and torch.equal(got, want)
    for name, value in ours.state_dict().items():
        assert torch.equal(cast.state_dict()[name], value), name


def test_parametrization_comes_off_and_takes_new_weights() -> None:
    layer = syncnorm.spectral_norm(nn.Linear(3, 2))
    layer.weight = torch.ones(2, 3)
    torch.testing.assert_close(layer.parametrizations.weight.original.detach(), torch.ones(2, 3))
    assert "MatrixMap(dim=0), n_power_iterations=1" in repr(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


def test_errors_say_what_to_do() -> None:
    conv = nn.Conv2d(2, 3, 3)
    for arguments, kind, message in (
        ({"name": "kernel"}, ValueError, r"Conv2d has no tensor 'kernel'"),
        ({"n_power_iterations": 0}, ValueError, r"n_power_iterations must be at least 1, got 0"),
        ({"norm": "nuclear"}, ValueError, r"must be \"matrix\" or \"operator\", got 'nuclear'"),
        ({"dim": 4}, ValueError, r"a dim of the weight \[3, 2, 3, 3\], got 4"),
        ({"input_shape": (4, 4)}, ValueError, r"input_shape goes with norm=\"operator\""),
        ({"norm": "operator"}, ValueError, r"2 positive numbers; got input_shape=None\. Use the largest maps"),
        ({"norm": "operator", "input_shape": (4,)}, ValueError, r"got input_shape=\[4\]"),
        ({"norm": "operator", "input_shape": (4, 4), "dim": 0}, ValueError, r"dim goes with norm=\"matrix\""),
    ):
        with pytest.raises(kind, match=message):
            syncnorm.spectral_norm(conv, **arguments)
    with pytest.raises(TypeError, match=r"got 'weight' of Linear\. For a linear layer .*use norm=\"matrix\""):
        syncnorm.spectral_norm(nn.Linear(2, 2), norm="operator", input_shape=(4,))
    with pytest.raises(ValueError, match=r"for zero padding, got padding_mode='circular'"):
        syncnorm.spectral_norm(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), norm="operator", input_shape=(4, 4)
        )
    assert not parametrize.is_parametrized(conv)
