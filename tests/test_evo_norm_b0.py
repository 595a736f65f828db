"""Tier: gloo ranks. EvoNorm-B0 against its formula: written out in numpy, and in float64 torch for the gradients."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.functional import evo_norm_b0
from syncnorm.modules import EvoNormB0
from syncnorm.testing import RankError, count_collectives, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch

# Float64; third powers and a gradient penalty over up to 160 values per channel, relative to the largest result.
BOUND = 1e-12
SHAPES = [(8, 3), (8, 3, 7), (8, 3, 4, 5), (8, 3, 1, 1), (8, 3, 2, 3, 2)]


class Paper(nn.Module):
    """Table 1 of Liu et al. (2020) on one process, with autograd for the gradients."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps, self.momentum = eps, 0.1
        self.weight, self.bias, self.v = (nn.Parameter(torch.ones(channels, dtype=torch.float64)) for _ in range(3))
        self.register_buffer("running_var", torch.ones(channels, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        space = tuple(range(2, x.dim()))
        wide = [1, -1, *[1] * len(space)]
        batch = (x - x.mean((0, *space), keepdim=True)).square().mean((0, *space), keepdim=True)
        sample = (x - x.mean(space, keepdim=True)).square().mean(space, keepdim=True) if space else torch.zeros_like(x)
        if self.training:
            n = x.numel() // x.size(1)
            with torch.no_grad():
                if n > 1:
                    self.running_var.lerp_(batch.flatten() * n / (n - 1), self.momentum)
                    self.num_batches_tracked += 1
        else:
            batch = self.running_var.view(wide)
        denominator = torch.maximum((batch + self.eps).sqrt(), self.v.view(wide) * x + (sample + self.eps).sqrt())
        return x / denominator * self.weight.view(wide) + self.bias.view(wide)


def pair(channels: int = 3, **options: object) -> tuple[EvoNormB0, Paper]:
    theirs = Paper(channels)
    randomise_affine(theirs)
    ours = EvoNormB0(channels, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def worst(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert set(mine) == set(exact)
    return max(float((mine[n] - e).abs().max()) / max(float(e.abs().max()), 1.0) for n, e in exact.items())


def test_output_is_the_formula_in_numpy() -> None:
    ours, _ = pair()
    x = whole_batch((8, 3, 4, 5))[0]
    a = x.numpy()
    batch = a.var(axis=(0, 2, 3), keepdims=True)
    sample = a.var(axis=(2, 3), keepdims=True)
    v, gamma, beta = (p.detach().numpy().reshape(1, 3, 1, 1) for p in (ours.v, ours.weight, ours.bias))
    y = a / np.maximum(np.sqrt(batch + 1e-3), v * a + np.sqrt(sample + 1e-3)) * gamma + beta
    torch.testing.assert_close(ours(x), torch.from_numpy(y), rtol=1e-13, atol=1e-13)
    running = 0.9 + 0.1 * a.transpose(1, 0, 2, 3).reshape(3, -1).var(axis=1, ddof=1)
    torch.testing.assert_close(ours.running_var, torch.from_numpy(running), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 1, 1), (2, 3, 1, 1), (1, 3, 4, 5)], ids=str)
def test_alone_it_is_the_paper_to_the_second_derivative_and_in_evaluation(shape: tuple[int, ...]) -> None:
    """One and two values per channel are among the shapes, where implementations with unbiased variances give NaN."""
    ours, theirs = pair()
    x, loss_weight = whole_batch(shape)
    for training in (True, True, False):
        exact = results(theirs.train(training), x, loss_weight)
        mine = results(ours.train(training), x, loss_weight)
        assert all(bool(value.isfinite().all()) for value in mine.values())
        assert worst(mine, exact) <= BOUND


def test_zeros_and_constants_have_finite_gradients() -> None:
    ours, _ = pair()
    for x in (torch.zeros(2, 3, 2, 2, dtype=torch.float64), torch.full((4, 3, 1, 1), 7.0, dtype=torch.float64)):
        out = results(ours, x, torch.ones_like(x))
        assert all(bool(value.isfinite().all()) for value in out.values())


def _over_ranks(splits: list[int]) -> dict[str, float]:
    out: dict[str, float] = {}
    for shape in SHAPES:
        ours, theirs = pair()
        x, loss_weight = whole_batch(shape)
        part = my_slice(splits)
        for step in range(2):
            exact = results(theirs, x, loss_weight)
            mine = results(ours, x[part], loss_weight[part])
            out |= {f"{shape} {step} {name}": error for name, error in errors(mine, exact, part).items()}
        with count_collectives() as counts:
            ours(x[part].requires_grad_()).sum().backward()
        assert counts == {"all_reduce": 2}
        with count_collectives() as counts:
            ours.eval()(x[part])
        assert counts == {}
    return out


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[4, 4], [5, 0, 3], [1, 1, 0, 6]], ids=str)
def test_ranks_equal_the_whole_batch(splits: list[int]) -> None:
    for per_rank in run_ranks(_over_ranks, len(splits), splits):
        assert not {name: error for name, error in per_rank.items() if not error <= BOUND}


def _one_value_in_all() -> float:
    ours, theirs = pair()
    x, loss_weight = whole_batch((1, 3, 1, 1))
    part = my_slice([0, 1])
    exact, mine = results(theirs, x, loss_weight), results(ours, x[part], loss_weight[part])
    assert torch.equal(ours.running_var, torch.ones(3, dtype=torch.float64)) and int(ours.num_batches_tracked) == 0
    return max(errors(mine, exact, part).values())


@pytest.mark.gloo
def test_one_value_in_the_whole_group_is_right() -> None:
    assert max(run_ranks(_one_value_in_all, 2)) <= BOUND


def _apart(splits: list[int]) -> dict[str, float]:
    ours, theirs = pair()
    x, loss_weight = whole_batch((8, 3, 4, 5))
    part = my_slice(splits)
    with syncnorm.disabled(ours), count_collectives() as counts:
        mine = results(ours, x[part], loss_weight[part], second_order=False)
    assert counts == {}
    return errors(mine, results(theirs, x, loss_weight, second_order=False), part)


@pytest.mark.gloo
def test_negative_control_with_ranks_apart_the_results_differ() -> None:
    for per_rank in run_ranks(_apart, 2, [5, 3]):
        assert min(per_rank[name] for name in ("y", "dx", "running_var")) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    x = (whole_batch((8, 3, 4, 5))[0] * 300).to(dtype)  # squares that float16 cannot hold
    with torch.no_grad():
        y, exact = ours.float()(x), theirs(x.double())
    assert y.dtype == dtype
    bound = torch.finfo(dtype).eps + 1e-6  # one rounding of the output, a few of float32 statistics
    assert float((y.double() - exact).abs().max()) <= bound * float(exact.abs().max())
    half = EvoNormB0(3).to(dtype)
    assert half.running_var.dtype == torch.float32
    x = torch.full((4, 3, 2, 2), 300.0, dtype=dtype, requires_grad=True)
    half(x).sum().backward()
    assert x.grad.dtype == dtype and bool(x.grad.isfinite().all()) and bool(half.v.grad.isfinite().all())


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(*args: Tensor) -> Tensor:
        return evo_norm_b0(*args, training=True)

    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


def test_layouts_and_empty_batches() -> None:
    ours, _ = pair()
    x = whole_batch((8, 3, 4, 5))[0]
    exact = copy.deepcopy(ours)(x)
    last = copy.deepcopy(ours)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, exact, rtol=1e-12, atol=1e-12)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        empty = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        y = ours(empty)
        y.sum().backward()
        assert y.shape == shape and empty.grad.shape == shape
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_copies_states_and_contexts() -> None:
    layer, _ = pair()
    x = whole_batch((8, 3, 4, 5))[0]
    layer(x)
    assert set(layer.state_dict()) == {"weight", "bias", "v", "running_var", "num_batches_tracked"}
    fresh = EvoNormB0(3, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin.eval()(x), layer.eval()(x))
    before = layer.train().running_var.clone()
    with syncnorm.no_stats_update(layer):
        layer(x + 5)
    assert torch.equal(layer.running_var, before)
    layer.reset_parameters()
    assert layer.running_var.tolist() == layer.v.tolist() == [1.0] * 3
    untracked = EvoNormB0(3, track_running_stats=False, affine=False, dtype=torch.float64)
    assert list(untracked.state_dict()) == ["v"]
    assert torch.equal(untracked.eval()(x), untracked.train()(x))
    (row,) = syncnorm.inspect(nn.Sequential(EvoNormB0(3))).rows
    assert (row.type, row.group, row.notes) == ("EvoNormB0", "world", ())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_once(use_reentrant: bool) -> None:
    ours, plain = pair()[0], pair()[0]
    a, b = (whole_batch((8, 3, 4, 5))[0].requires_grad_() for _ in range(2))
    checkpoint(ours, a, use_reentrant=use_reentrant).pow(3).sum().backward()
    plain(b).pow(3).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


def _compiled(splits: list[int]) -> float:
    ours, theirs = pair()
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    x, loss_weight = whole_batch((8, 3, 4, 5))
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(a := x[part].clone().requires_grad_())
    (y.pow(3) * loss_weight[part]).sum().backward()
    y, exact = y.detach(), results(theirs, x, loss_weight, second_order=False)
    assert int(ours.num_batches_tracked) == 1
    pairs = [(y, exact["y"][part]), (a.grad, exact["dx"][part]), (ours.running_var, exact["running_var"])]
    return max(float((mine - other).abs().max()) for mine, other in pairs if mine.numel()) / float(
        exact["dx"].abs().max()
    )


@pytest.mark.gloo
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    assert _compiled([8]) <= BOUND
    assert max(run_ranks(_compiled, 2, [0, 8])) <= BOUND


def test_exports_in_evaluation() -> None:
    ours, theirs = pair()
    x = whole_batch((8, 3, 4, 5))[0]
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    layer = EvoNormB0(3)
    with pytest.raises(ValueError, match=r"EvoNormB0: expected 3 channels in dim 1, got an input \[2, 5, 2, 2\]"):
        layer(torch.randn(2, 5, 2, 2))
    with pytest.raises(TypeError, match="expected a floating-point input"):
        layer(torch.ones(2, 3, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        EvoNormB0(3, eps=0.0)


def _one_rank_refuses() -> None:
    EvoNormB0(3)(torch.randn(2, 3 + dist.get_rank(), 2, 2))


@pytest.mark.gloo
def test_an_input_refused_on_one_rank_is_told_to_the_others() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_one_rank_refuses, 2)
    assert "1 of 2 ranks refused their input" in caught.value.errors[0]
    assert "expected 3 channels" in caught.value.errors[1]
