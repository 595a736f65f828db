"""Tier: no process. Masked batch norm and batch renormalisation against Keras 3 on its torch backend.

Keras counts momentum for the old statistics, keeps the biased variance (batch renormalisation: the standard deviation with
eps in it), has channels last, and computes in float32 whatever its dtype is. Each step starts from its statistics, brought
into our convention; ours is in float64.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncnorm.modules import BatchRenorm2d, SyncBatchNorm1d
from tests.oracles import randomise_affine

EPS, MOMENTUM = 1e-3, 0.1

# Chains of about ten float32 operations on up to 40 values, each rounded by 6e-8; Keras also divides masked sums by the
# count + 1e-7. The conventions above are 1/30 and more apart.
BOUND = 1e-5


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        keras = pytest.importorskip("keras", reason="Keras 3 is not installed (extra: dev)")
        if keras.backend.backend() != "torch":
            pytest.skip(f"Keras was imported before with the backend {keras.backend.backend()}")
        yield keras


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def twin(keras: Any, ours: nn.Module, dims: int, **options: Any) -> Any:
    """A layer of Keras with the parameters of ``ours``."""
    theirs = keras.layers.BatchNormalization(momentum=1 - MOMENTUM, epsilon=EPS, **options)
    theirs.build((None,) * (dims - 1) + (ours.num_features,))
    theirs.gamma.assign(ours.weight.detach())
    theirs.beta.assign(ours.bias.detach())
    return theirs


def inputs(step: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, dy = (torch.randn(*shape, generator=generator) for _ in range(2))
    return x * (1 + step) + 0.5, dy


def statistic(variable: Any) -> Tensor:
    return variable.value.detach().double()


def assert_close(got: Tensor, want: Tensor) -> None:
    scale = max(1.0, float(got.detach().abs().max()))
    torch.testing.assert_close(got, want.double(), rtol=0, atol=BOUND * scale)


def assert_same_step(ours: nn.Module, theirs: Any, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> None:
    """Output and gradients of one training step."""
    options = {} if mask is None else {"mask": mask}
    mine, other = x.double().requires_grad_(), last(x).clone().requires_grad_()
    y, z = ours(mine, **options), theirs(other, training=True, **options)
    got = [y, *torch.autograd.grad(y, [mine, ours.weight, ours.bias], dy.double())]
    want = [z, *torch.autograd.grad(z, [other, theirs.gamma.value, theirs.beta.value], last(dy))]
    want[:2] = [t.movedim(-1, 1) for t in want[:2]]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def batch_variance(ours: nn.Module, before: Tensor, count: int) -> Tensor:
    """The biased variance that moved our running one."""
    return (ours.running_var - (1 - MOMENTUM) * before) / MOMENTUM * (count - 1) / count


@pytest.mark.parametrize("masked", [True, False])
def test_masked_batch_norm(keras: Any, masked: bool) -> None:
    ours = SyncBatchNorm1d(3, eps=EPS, momentum=MOMENTUM, dtype=torch.float64)
    randomise_affine(ours)
    theirs = twin(keras, ours, 3)
    for step in range(4):
        x, dy = inputs(step, 6, 3, 5)
        lengths = (torch.arange(6) + step) % 6  # one sequence has nothing that counts
        mask = torch.arange(5)[None] < lengths[:, None]
        count = int(mask.sum()) if masked else 30
        old_mean, old_var = statistic(theirs.moving_mean), statistic(theirs.moving_variance)
        ours.running_mean.copy_(old_mean)
        ours.running_var.copy_(old_var)
        assert_same_step(ours, theirs, x, dy, mask if masked else None)
        assert_close(ours.running_mean, statistic(theirs.moving_mean))
        biased = (1 - MOMENTUM) * old_var + MOMENTUM * batch_variance(ours, old_var, count)
        assert_close(biased, statistic(theirs.moving_variance))


@pytest.mark.parametrize("limits", [(1.1, 0.1), (3.0, 5.0), (1e9, 1e9)], ids=str)
def test_batch_renorm(keras: Any, limits: tuple[float, float]) -> None:
    if "renorm" not in inspect.signature(keras.layers.BatchNormalization).parameters:
        pytest.skip(f"Keras {keras.__version__} has no batch renormalisation")
    r_max, d_max = limits
    ours = BatchRenorm2d(3, eps=EPS, momentum=MOMENTUM, r_max=r_max, d_max=d_max, dtype=torch.float64)
    randomise_affine(ours)
    clipping = {"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max}
    theirs = twin(keras, ours, 4, renorm=True, renorm_clipping=clipping, renorm_momentum=1 - MOMENTUM)
    for step in range(4):
        x, dy = inputs(step, 2, 3, 4, 5)
        old_std = statistic(theirs.renorm_stddev)
        old_var = old_std.square() - EPS
        ours.running_mean.copy_(statistic(theirs.renorm_mean))
        ours.running_var.copy_(old_var)
        assert_same_step(ours, theirs, x, dy)
        assert_close(ours.running_mean, statistic(theirs.renorm_mean))
        std = (batch_variance(ours, old_var, 40) + EPS).sqrt()
        moved = (1 - MOMENTUM) * old_std + MOMENTUM * std
        assert_close(moved, statistic(theirs.renorm_stddev))
    ours.running_mean.copy_(statistic(theirs.moving_mean))
    ours.running_var.copy_(statistic(theirs.moving_variance))
    assert_close(ours.eval()(x.double()), theirs(last(x), training=False).movedim(-1, 1))
