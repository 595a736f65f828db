"""Tier: gloo ranks. Moving average batch norm against its formulas in numpy, both directions, over many steps and over ranks.

Its backward is not the derivative of its forward, so autograd is an oracle only for a window of one batch.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.modules import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import my_slice, randomise_affine

Array = np.ndarray


class Paper:
    """The whole batch in one place, with every past batch in a list. Float64."""

    def __init__(self, layer: nn.Module) -> None:
        self.m, self.warmup, self.r_max = layer.window, layer.warmup, layer.r_max
        self.eps, self.alpha = layer.eps, 1 - layer.momentum
        self.gamma, self.beta, self.c, self.ema = (
            t.detach().numpy().copy() for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        )
        self.chi: list[Array] = []
        self.psi: list[Array] = []

    @staticmethod
    def wide(vector: Array, x: Array) -> Array:
        return vector.reshape(1, -1, *[1] * (x.ndim - 2))

    def forward(self, x: Array) -> tuple[Array, Array, Array]:
        axes = (0, *range(2, x.ndim))
        centred = x - self.wide(self.c, x)
        self.chi.append((centred**2).mean(axes))
        std = np.sqrt(np.mean(self.chi[-self.m :], axis=0) + self.eps)
        r = np.clip(std / np.sqrt(self.ema + self.eps), 1 / self.r_max, self.r_max)
        if len(self.chi) <= self.warmup:
            r = np.ones_like(r)
        self.ema = self.alpha * self.ema + (1 - self.alpha) * self.chi[-1]
        return centred / self.wide(std, x), std, r

    def backward(self, z: Array, std: Array, r: Array, dy: Array) -> dict[str, Array]:
        axes = (0, *range(2, z.ndim))
        g = self.wide(self.gamma * r, z) * dy
        self.psi.append((g * z).mean(axes))
        slope = np.mean(self.psi[-self.m :], axis=0)
        return {
            "dx": (g - z * self.wide(slope, z)) / self.wide(std, z),
            "sum:dweight": (dy * z * self.wide(r, z)).sum(axes),
            "sum:dbias": dy.sum(axes),
        }

    def step(self, x: Tensor, dy: Tensor) -> dict[str, Array]:
        z, std, r = self.forward(x.numpy())
        y = self.wide(self.gamma * r, z) * z + self.wide(self.beta, z)
        return {"y": y, "running_var": self.ema} | self.backward(z, std, r, dy.numpy())


def make(channels: int = 3, kind: type[nn.Module] = MovingAverageBatchNorm2d, **options: object) -> nn.Module:
    """A layer whose window fills and whose warm-up ends within a few steps, about a centre that is not 0."""
    options = {"window": 4, "warmup": 3, "r_max": 1.3, "momentum": 0.3, "dtype": torch.float64} | options
    layer = kind(channels, **options)
    randomise_affine(layer)
    layer.running_mean.copy_(torch.linspace(-0.5, 1, channels))
    return layer


def data(step: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Input and output gradient of one step, the same on every rank; their scale drifts."""
    generator = torch.Generator().manual_seed(100 + step)
    x, dy = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x * (1 + step / 4) + 0.3, dy


def train(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, dweight, dbias = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    return {
        "y": y.detach(),
        "dx": dx,
        "sum:dweight": dweight,
        "sum:dbias": dbias,
        "running_var": layer.running_var.clone(),
    }


def worst(mine: dict[str, Tensor], exact: dict[str, Array], part: slice = slice(None)) -> float:
    """Largest error, relative to the largest value; parameter gradients are summed over the ranks."""
    errors = [0.0]
    for name, value in mine.items():
        if name.startswith("sum:") and dist.is_initialized():
            dist.all_reduce(value)
        want = torch.from_numpy(exact[name])
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        want = want[part] if name in ("y", "dx") else want
        assert value.shape == want.shape and value.isfinite().all(), (name, value.shape, want.shape)
        errors += [float((value - want).abs().max()) / scale] if value.numel() else []
    return max(errors)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_twelve_steps_equal_the_formulas(window: int, backend: str) -> None:
    layer = make(window=window, backend=backend)
    paper = Paper(layer)
    for step in range(12):
        x, dy = data(step, (3 + step % 2, 3, 4, 5))
        assert worst(train(layer, x, dy), paper.step(x, dy)) <= 1e-12, step
        with torch.no_grad():  # an optimizer moves γ, in one step to 0: what earlier batches had counts on
            layer.weight.add_(0.1)
            layer.weight[0] = 0.0 if step == 5 else 0.7
        paper.gamma = layer.weight.detach().numpy().copy()
    assert (layer.num_batches_tracked, layer.running_mean.tolist()) == (12, paper.c.tolist())


@pytest.mark.parametrize(
    ("kind", "shape"), [(MovingAverageBatchNorm1d, (4, 3)), (MovingAverageBatchNorm3d, (2, 3, 2, 3, 2))]
)
def test_other_numbers_of_dims(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = make(kind=kind)
    paper = Paper(layer)
    for step in range(6):
        x, dy = data(step, shape)
        assert worst(train(layer, x, dy), paper.step(x, dy)) <= 1e-12


def _over_ranks(splits: list[int]) -> list[float]:
    layer = make()
    paper, errors = Paper(layer), []
    for step in range(10):
        # every rank is empty in one step: nothing moves
        now = [0] * len(splits) if step == 4 else splits[step % len(splits) :] + splits[: step % len(splits)]
        x, dy = data(step, (sum(now), 3, 2, 3))
        part = my_slice(now)
        with count_collectives() as counts:
            mine = train(layer, x[part], dy[part])
        assert counts == {"all_reduce": 2}
        if step == 4:
            assert mine["y"].shape == mine["dx"].shape == (0, 3, 2, 3)
            assert not mine["sum:dweight"].any() and not mine["sum:dbias"].any()
            continue
        errors.append(worst(mine, paper.step(x, dy), part))
    return errors


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[2, 2], [3, 0, 1], [1, 1]], ids=str)
def test_ranks_equal_the_whole_batch_step_by_step(splits: list[int]) -> None:
    for per_rank in run_ranks(_over_ranks, len(splits), splits):
        assert max(per_rank) <= 1e-12, per_rank


def _compiled_over_ranks() -> list[float]:
    first, second = make(kind=MovingAverageBatchNorm1d), make(kind=MovingAverageBatchNorm1d)
    papers, errors = [Paper(first), Paper(second)], []
    compiled = torch.compile(lambda x: second(first(x)), fullgraph=True, backend="aot_eager")
    for step in range(5):
        x, dy = data(step, (3, 3))
        part = my_slice([3, 0])
        mine = x[part].clone().requires_grad_()
        compiled(mine).backward(dy[part])
        kept = papers[0].forward(x.numpy())
        y = Paper.wide(papers[0].gamma * kept[2], kept[0]) * kept[0] + papers[0].beta
        dx = papers[1].backward(*papers[1].forward(y), dy.numpy())["dx"]
        dx = papers[0].backward(*kept, dx)["dx"]
        errors.append(float((mine.grad - torch.from_numpy(dx)[part]).abs().sum()))
        errors += [
            float((layer.running_var - torch.from_numpy(paper.ema)).abs().max())
            for layer, paper in zip((first, second), papers, strict=True)
        ]
    return errors


@pytest.mark.gloo
@pytest.mark.slow
def test_compiled_steps_over_ranks_one_of_them_empty() -> None:
    for per_rank in run_ranks(_compiled_over_ranks, 2):
        assert max(per_rank) <= 1e-11, per_rank


def _ddp() -> list[float]:
    layer = make(kind=MovingAverageBatchNorm1d)
    paper, model, errors = Paper(layer), DistributedDataParallel(layer), []
    for step in range(6):
        (first, dy), (second, _) = data(step, (4, 3)), data(step + 50, (4, 3))
        part = my_slice([2, 2])
        y = model(first[part])
        model(second[part])  # writes to the buffers before the backward of the first one
        layer.zero_grad()
        y.backward(dy[part])
        kept = paper.forward(first.numpy())
        paper.forward(second.numpy())
        exact = paper.backward(*kept, dy.numpy())
        errors.append(float((layer.weight.grad * 2 - torch.from_numpy(exact["sum:dweight"])).abs().max()))
        errors.append(float((layer.running_var - torch.from_numpy(paper.ema)).abs().max()))
    return errors


@pytest.mark.gloo
def test_ddp_with_two_forwards_before_a_backward() -> None:
    for per_rank in run_ranks(_ddp, 2):
        assert max(per_rank) <= 1e-11, per_rank


def test_with_a_window_of_one_the_gradient_is_the_derivative_and_with_more_it_is_not() -> None:
    x, _ = data(0, (4, 3, 2))
    for window in (1, 4):
        layer = make(kind=MovingAverageBatchNorm1d, window=window, warmup=10**6)
        for step in range(3):
            train(layer, *data(step + 1, (4, 3, 2)))
        with syncnorm.no_stats_update(layer):
            before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            holds = torch.autograd.gradcheck(layer, (x.clone().requires_grad_(),), raise_exception=False)
            assert holds == (window == 1)
            parameters = [layer.weight.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()]
            assert torch.autograd.gradcheck(
                lambda w, b, on=layer: torch.func.functional_call(on, {"weight": w, "bias": b}, (x,)), parameters
            )
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_a_single_value_trains_and_an_empty_batch_moves_nothing() -> None:
    layer = make(kind=MovingAverageBatchNorm1d)
    paper = Paper(layer)
    for step in range(5):
        x, dy = data(step, (1, 3))
        assert worst(train(layer, x, dy), paper.step(x, dy)) <= 1e-12
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    train(layer, *data(0, (0, 3)))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_a_gradient_that_is_not_finite_is_not_kept() -> None:
    layer = make()
    train(layer, *data(0, (2, 3, 4, 5)))
    x, dy = data(1, (2, 3, 4, 5))
    overflown = dy.clone()
    overflown[0, 0, 0, 0] = torch.inf
    assert not train(layer, x, overflown)["dx"].isfinite().all()  # a loss scaler sees it, and skips the step
    assert layer._slopes.isfinite().all() and int(layer._slopes[:, -1].sum()) == 1
    assert train(layer, x, dy)["dx"].isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_moves_no_average_and_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain, recomputed = make(), make()
    for step in range(6):
        x, dy = data(step, (2, 3, 4, 5))
        want = train(plain, x, dy)
        x = x.clone().requires_grad_()
        checkpoint(recomputed, x, use_reentrant=use_reentrant).backward(dy)
        assert torch.equal(x.grad, want["dx"])
    for (name, mine), theirs in zip(recomputed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


class Rerun(torch.autograd.Function):
    """Somebody's own checkpoint: the forward keeps only its input, the backward calls the layer again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.layer(ctx.saved_tensors[0].detach().requires_grad_()).backward(grad)
        raise AssertionError("the layer did not notice")


def test_a_recompute_that_is_not_recognised_is_refused() -> None:
    y = Rerun.apply(data(0, (2, 3, 4, 5))[0].requires_grad_(), make())
    with pytest.raises(syncnorm.SyncNormError, match="recomputed within a checkpointed region that is not recognised"):
        y.sum().backward()


def test_compiled_steps_equal_eager_ones_without_recompilation() -> None:
    eager, layer = make(), make()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            x, dy = data(step, (2, 3, 4, 5))
            a, b = (x.clone().requires_grad_() for _ in range(2))
            compiled(a).backward(dy)
            eager(b).backward(dy)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(layer.weight.grad, eager.weight.grad, rtol=1e-11, atol=1e-11)
    for (name, mine), theirs in zip(layer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=name)


def test_buffers_may_be_written_between_a_forward_and_its_backward() -> None:
    layer = make()
    x, dy = data(0, (2, 3, 4, 5))
    want = train(copy.deepcopy(layer), x, dy)["dx"]
    y = layer(x.requires_grad_())
    layer.running_mean.add_(1)
    layer.running_var.mul_(2)
    y.backward(dy)
    assert torch.equal(x.grad, want)


def test_there_is_no_second_derivative_and_it_says_so() -> None:
    layer = make()
    x, dy = data(0, (2, 3, 4, 5))
    want = train(copy.deepcopy(layer), x, dy)
    by_func = torch.func.grad(lambda x: (layer(x) * dy).sum())(x)
    torch.testing.assert_close(by_func, want["dx"], rtol=1e-12, atol=1e-12)
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad((layer(x) * dy).sum(), x, create_graph=True)
    with pytest.raises(syncnorm.SyncNormError, match="is no derivative, so it has none itself"):
        torch.autograd.grad(dx.square().sum(), x)
