"""Tier: gloo ranks. Batch-instance norm against the paper's formula on the whole batch, and ρ at its two ends."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.functional import batch_instance_norm
from syncnorm.modules import BatchInstanceNorm1d, BatchInstanceNorm2d, BatchInstanceNorm3d
from syncnorm.testing import RankError, count_collectives, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch

# Float64; third powers and a gradient penalty over up to 160 values per channel, relative to the largest result.
BOUND = 1e-12
SHAPES = [(8, 3), (8, 3, 7), (8, 3, 4, 5), (8, 3, 1, 1), (8, 3, 2, 3, 2)]
LAYERS = {2: BatchInstanceNorm1d, 3: BatchInstanceNorm1d, 4: BatchInstanceNorm2d, 5: BatchInstanceNorm3d}


class Paper(nn.Module):
    """Equations 3 and 4 of Nam & Kim (2018) on one process, with autograd for the gradients."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.momentum = eps, 0.1
        self.weight, self.bias, self.rho = (nn.Parameter(torch.ones(channels, dtype=torch.float64)) for _ in range(3))
        self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(channels, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        space = tuple(range(2, x.dim()))
        wide = [1, -1, *[1] * len(space)]
        mean = x.mean((0, *space), keepdim=True)
        var = (x - mean).square().mean((0, *space), keepdim=True)
        sample_mean = x.mean(space, keepdim=True) if space else x
        sample_var = (x - sample_mean).square().mean(space, keepdim=True) if space else torch.zeros_like(x)
        if self.training:
            n = x.numel() // x.size(1)
            with torch.no_grad():
                self.running_mean.lerp_(mean.flatten(), self.momentum)
                self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
                self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean.view(wide), self.running_var.view(wide)
        by_batch = (x - mean) / (var + self.eps).sqrt()
        by_instance = (x - sample_mean) / (sample_var + self.eps).sqrt()
        rho, weight, bias = (p.view(wide) for p in (self.rho, self.weight, self.bias))
        return (rho * by_batch + (1 - rho) * by_instance) * weight + bias


def pair(shape: tuple[int, ...], **options: object) -> tuple[nn.Module, Paper]:
    theirs = Paper(shape[1])
    randomise_affine(theirs)
    theirs.rho.data.copy_(torch.linspace(0, 1, shape[1]))  # both ends, and between
    ours = LAYERS[len(shape)](shape[1], dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_it_is_the_paper_to_the_second_derivative_and_in_evaluation(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(shape)
    x, loss_weight = whole_batch(shape)
    for training in (True, True, False):
        exact = results(theirs.train(training), x, loss_weight)
        mine = results(ours.train(training), x, loss_weight)
        assert set(mine) == set(exact)
        for name, value in exact.items():
            assert float((mine[name] - value).abs().max()) <= BOUND * max(float(value.abs().max()), 1.0), name


def _over_ranks(splits: list[int]) -> dict[str, float]:
    out: dict[str, float] = {}
    for shape in SHAPES:
        ours, theirs = pair(shape)
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


def _apart(splits: list[int]) -> dict[str, float]:
    ours, theirs = pair((8, 3, 4, 5))
    x, loss_weight = whole_batch((8, 3, 4, 5))
    part = my_slice(splits)
    with syncnorm.disabled(ours), count_collectives() as counts:
        mine = results(ours, x[part], loss_weight[part], second_order=False)
    assert counts == {}
    return errors(mine, results(theirs, x, loss_weight, second_order=False), part)


@pytest.mark.gloo
def test_negative_control_with_ranks_apart_the_results_differ() -> None:
    for per_rank in run_ranks(_apart, 2, [5, 3]):
        assert min(per_rank[name] for name in ("y", "dx", "running_mean", "running_var")) > 1e-4


def test_the_ends_are_batch_norm_and_instance_norm() -> None:
    x = whole_batch((8, 3, 4, 5))[0]
    layer = BatchInstanceNorm2d(3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3, dtype=torch.float64)(x), rtol=1e-12, atol=1e-12)
    nn.init.zeros_(layer.rho)
    torch.testing.assert_close(layer(x), nn.InstanceNorm2d(3)(x), rtol=1e-12, atol=1e-12)


def test_rho_outside_counts_as_the_end_keeps_its_gradient_and_is_brought_back() -> None:
    x, loss_weight = whole_batch((8, 3, 4, 5))
    slopes = []
    for outside, end in (([1.5, -0.25, 0.5], [1.0, 0.0, 0.5]), ([1.0, 0.0, 0.5],) * 2):
        rho = torch.tensor(outside, dtype=torch.float64, requires_grad=True)
        y = batch_instance_norm(x, rho, training=True)
        assert torch.equal(y, batch_instance_norm(x, torch.tensor(end, dtype=torch.float64), training=True))
        slopes.append(torch.autograd.grad((y.pow(3) * loss_weight).sum(), rho)[0])
    assert torch.equal(*slopes) and float(slopes[0].abs().min()) > 1e-3

    layer = BatchInstanceNorm2d(3, dtype=torch.float64)
    layer.rho.data.copy_(torch.tensor([1.5, -0.25, 0.5]))
    layer.eval()(x)
    assert layer.rho.tolist() == [1.5, -0.25, 0.5]  # evaluation changes nothing
    layer.train()
    first, second = layer(x), layer(2 * x)  # two forwards and only then their backward
    assert layer.rho.tolist() == [1.0, 0.0, 0.5]
    (first + second).pow(3).sum().backward()
    optimizer = torch.optim.SGD([layer.rho], lr=100.0)
    for _ in range(3):
        optimizer.step()
        layer(x)
        assert float(layer.rho.detach().min()) >= 0 and float(layer.rho.detach().max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    ours, theirs = pair((8, 3, 4, 5))
    x = (whole_batch((8, 3, 4, 5))[0] * 300).to(dtype)  # squares that float16 cannot hold
    with torch.no_grad():
        y, exact = ours.float()(x), theirs(x.double())
    assert y.dtype == dtype
    bound = torch.finfo(dtype).eps + 1e-6  # one rounding of the output, a few of float32 statistics
    assert float((y.double() - exact).abs().max()) <= bound * float(exact.abs().max())
    half = BatchInstanceNorm2d(3).to(dtype)
    assert half.running_var.dtype == torch.float32
    x = torch.randn(4, 3, 2, 2, dtype=dtype, requires_grad=True)
    half(x).sum().backward()
    assert x.grad.dtype == dtype and half.rho.grad.dtype == dtype


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    rho = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    affine = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(*args: Tensor) -> Tensor:
        return batch_instance_norm(*args, training=True)

    assert torch.autograd.gradcheck(run, (x, rho, *affine))
    assert torch.autograd.gradgradcheck(run, (x, rho, *affine))


def test_torch_func_has_its_gradient_in_training() -> None:
    layer, x = BatchInstanceNorm2d(3, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    layer.rho.data.copy_(torch.tensor([1.5, -0.25, 0.5]))
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    got = torch.func.grad(lambda x: torch.func.functional_call(layer, state, (x,)).pow(3).sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).pow(3).sum(), x)[0])


def test_layouts_and_empty_batches() -> None:
    ours, _ = pair((8, 3, 4, 5))
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
    layer, _ = pair((8, 3, 4, 5))
    x = whole_batch((8, 3, 4, 5))[0]
    layer(x)
    fresh = BatchInstanceNorm2d(3, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin.eval()(x), layer.eval()(x))
    before = layer.train().running_mean.clone()
    with syncnorm.no_stats_update(layer):
        layer(x + 5)
    assert torch.equal(layer.running_mean, before)
    layer.reset_parameters()
    assert layer.rho.tolist() == layer.running_var.tolist() == [1.0] * 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_once(use_reentrant: bool) -> None:
    ours, plain = pair((8, 3, 4, 5))[0], pair((8, 3, 4, 5))[0]
    a, b = (whole_batch((8, 3, 4, 5))[0].requires_grad_() for _ in range(2))
    checkpoint(ours, a, use_reentrant=use_reentrant).pow(3).sum().backward()
    plain(b).pow(3).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


def _compiled(splits: list[int]) -> float:
    ours, theirs = pair((8, 3, 4, 5))
    ours.rho.data[2] = 1.75  # brought back to the 1 that theirs has
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    x, loss_weight = whole_batch((8, 3, 4, 5))
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(a := x[part].clone().requires_grad_())
    assert ours.rho.tolist() == [0.0, 0.5, 1.0]
    (y.pow(3) * loss_weight[part]).sum().backward()
    y, exact = y.detach(), results(theirs, x, loss_weight, second_order=False)
    assert int(ours.num_batches_tracked) == 1
    pairs = [(y, exact["y"][part]), (a.grad, exact["dx"][part]), (ours.running_var, exact["running_var"])]
    if not dist.is_initialized():
        pairs.append((ours.rho.grad, exact["sum:drho"]))
    return max(float((mine - other).abs().max()) for mine, other in pairs if mine.numel()) / float(
        exact["dx"].abs().max()
    )


@pytest.mark.gloo
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    assert _compiled([8]) <= BOUND
    assert max(run_ranks(_compiled, 2, [0, 8])) <= BOUND


def test_exports_in_evaluation() -> None:
    ours, theirs = pair((8, 3, 4, 5))
    x = whole_batch((8, 3, 4, 5))[0]
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    layer = BatchInstanceNorm2d(3)
    with pytest.raises(
        ValueError, match=r"BatchInstanceNorm2d: expected 3 channels in dim 1, got an input \[2, 5, 2, 2\]"
    ):
        layer(torch.randn(2, 5, 2, 2))
    with pytest.raises(ValueError, match=r"of 4 dims, got \[2, 3, 2\]"):
        layer(torch.randn(2, 3, 2))
    with pytest.raises(TypeError, match="expected a floating-point input"):
        layer(torch.ones(2, 3, 2, 2, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="BatchInstanceNorm2d: expected more than 1 value per channel in the whole group"
    ):
        layer(torch.randn(1, 3, 1, 1))
    assert int(layer.num_batches_tracked) == 0


def _one_rank_refuses() -> None:
    BatchInstanceNorm2d(3)(torch.randn(2, 3 + dist.get_rank(), 2, 2))


@pytest.mark.gloo
def test_an_input_refused_on_one_rank_is_told_to_the_others() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_one_rank_refuses, 2)
    assert "1 of 2 ranks refused their input" in caught.value.errors[0]
    assert "expected 3 channels" in caught.value.errors[1]
