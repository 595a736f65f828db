"""Tier: gloo ranks. Switchable norm against the paper's formulas, each statistic taken straight from the whole batch."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.functional import switchable_norm
from syncnorm.modules import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from syncnorm.testing import RankError, count_collectives, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch

# Float64; third powers and a gradient penalty over up to 160 values per channel, relative to the largest result.
BOUND = 1e-12
LAYERS = {2: SwitchableNorm1d, 3: SwitchableNorm1d, 4: SwitchableNorm2d, 5: SwitchableNorm3d}


class Paper(nn.Module):
    """Equations 3 to 5 of Luo et al. (2019) on one process, with autograd for the gradients."""

    def __init__(self, channels: int, parts: int = 3, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.momentum = eps, 0.1
        self.weight, self.bias = (nn.Parameter(torch.ones(channels, dtype=torch.float64)) for _ in range(2))
        self.mean_logits, self.var_logits = (nn.Parameter(torch.ones(parts, dtype=torch.float64)) for _ in range(2))
        if parts == 3:
            self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float64))
            self.register_buffer("running_var", torch.ones(channels, dtype=torch.float64))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        space = tuple(range(2, x.dim()))
        over = [space, (1, *space), (0, *space)]
        means, variances = [], []
        for dims in over[: self.mean_logits.numel()]:
            mean = x.mean(dims, keepdim=True) if dims else x
            means.append(mean)
            variances.append((x - mean).square().mean(dims, keepdim=True) if dims else torch.zeros_like(x))
        if len(means) == 3:
            if self.training:
                n = x.numel() // x.size(1)
                with torch.no_grad():
                    self.running_mean.lerp_(means[2].flatten(), self.momentum)
                    self.running_var.lerp_(variances[2].flatten() * n / (n - 1), self.momentum)
                    self.num_batches_tracked += 1
            else:
                wide = [1, -1, *[1] * len(space)]
                means[2], variances[2] = self.running_mean.view(wide), self.running_var.view(wide)
        w, v = (torch.exp(u) / torch.exp(u).sum() for u in (self.mean_logits, self.var_logits))
        mean = sum(w[k] * m for k, m in enumerate(means))
        var = sum(v[k] * m for k, m in enumerate(variances))
        wide = [1, -1, *[1] * len(space)]
        return (x - mean) / (var + self.eps).sqrt() * self.weight.view(wide) + self.bias.view(wide)


def pair(shape: tuple[int, ...], **options: object) -> tuple[nn.Module, Paper]:
    theirs = Paper(shape[1], 2 if options.get("using_bn") is False else 3)
    randomise_affine(theirs)
    ours = LAYERS[len(shape)](shape[1], dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


SHAPES = [(8, 3), (8, 3, 7), (8, 3, 4, 5), (8, 3, 1, 1), (8, 3, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("using_bn", [True, False])
def test_alone_it_is_the_paper_to_the_second_derivative_and_in_evaluation(
    shape: tuple[int, ...], using_bn: bool
) -> None:
    ours, theirs = pair(shape, using_bn=using_bn)
    x, loss_weight = whole_batch(shape)
    for training in (True, True, False):
        exact = results(theirs.train(training), x, loss_weight)
        mine = results(ours.train(training), x, loss_weight)
        assert set(mine) == set(exact)
        assert max(errors_alone(mine, exact).values()) <= BOUND


def errors_alone(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((mine[name] - value).abs().max()) / max(float(value.abs().max()), 1.0)
        for name, value in exact.items()
    }


def _over_ranks(splits: list[int]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for shape in SHAPES:
        ours, theirs = pair(shape)
        x, loss_weight = whole_batch(shape)
        part = my_slice(splits)
        for step in range(2):
            exact = results(theirs, x, loss_weight)
            mine = results(ours, x[part], loss_weight[part])
            worst |= {f"{shape} {step} {name}": error for name, error in errors(mine, exact, part).items()}
        with count_collectives() as counts:
            ours(x[part].requires_grad_()).sum().backward()
        assert counts == {"all_reduce": 2}
        with count_collectives() as counts:
            ours.eval()(x[part])
            pair(shape, using_bn=False)[0](x[part])
        assert counts == {}
    return worst


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[4, 4], [5, 0, 3], [1, 1, 0, 6]], ids=str)
def test_ranks_equal_the_whole_batch(splits: list[int]) -> None:
    for per_rank in run_ranks(_over_ranks, len(splits), splits):
        assert not {name: error for name, error in per_rank.items() if not error <= BOUND}


def _disabled(splits: list[int]) -> dict[str, float]:
    ours, theirs = pair((8, 3, 4, 5))
    x, loss_weight = whole_batch((8, 3, 4, 5))
    part = my_slice(splits)
    with syncnorm.disabled(ours), count_collectives() as counts:
        mine = results(ours, x[part], loss_weight[part], second_order=False)
    assert counts == {}
    return errors(mine, results(theirs, x, loss_weight, second_order=False), part)


@pytest.mark.gloo
def test_negative_control_with_ranks_apart_the_results_differ() -> None:
    for per_rank in run_ranks(_disabled, 2, [5, 3]):
        for name in ("y", "dx", "running_mean", "running_var"):
            assert per_rank[name] > 1e-4, name


def test_shares_begin_equal_and_can_be_logged() -> None:
    layer = SwitchableNorm2d(3)
    for shares in (layer.mean_weights, layer.var_weights):
        assert list(shares) == ["instance", "layer", "batch"]
        assert all(not share.requires_grad and abs(float(share) - 1 / 3) < 1e-6 for share in shares.values())
    layer = SwitchableNorm2d(3, using_bn=False).bfloat16()
    layer.var_logits.data.copy_(torch.tensor([2.0, 1.0]))
    assert list(layer.var_weights) == ["instance", "layer"]
    assert abs(float(layer.var_weights["instance"]) - 1 / (1 + torch.e**-1)) < 1e-6
    assert layer.running_mean is None and "num_batches_tracked" not in layer.state_dict()
    assert "using_bn=False" in repr(layer)


def test_one_hot_mixtures_are_the_three_norms() -> None:
    x = whole_batch((8, 3, 4, 5))[0]
    others = [nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3)]
    for k, other in enumerate(others):
        layer = SwitchableNorm2d(3, dtype=torch.float64)
        for logits in (layer.mean_logits, layer.var_logits):
            logits.data[k] = 1000.0
        torch.testing.assert_close(layer(x), other.double()(x), rtol=1e-12, atol=1e-12)


def test_maps_of_one_value_and_a_single_value_are_finite_and_right() -> None:
    for n in (4, 1):
        shape = (n, 5, 1, 1)
        ours, theirs = pair(shape)
        x, loss_weight = whole_batch(shape)
        theirs.momentum = 0.0 if n == 1 else 0.1  # 1/(n - 1); a single value moves nothing
        before = ours.running_var.clone()
        exact, mine = results(theirs, x, loss_weight), results(ours, x, loss_weight)
        if n == 1:
            assert torch.equal(ours.running_var, before) and int(ours.num_batches_tracked) == 0
            exact = {name: value for name, value in exact.items() if not name.startswith(("running", "num"))}
        assert all(bool(value.isfinite().all()) for value in mine.values())
        assert max(errors_alone(mine, exact).values()) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    ours, theirs = pair((8, 3, 4, 5))
    x = (whole_batch((8, 3, 4, 5))[0] * 300).to(dtype)  # squares that float16 cannot hold
    with torch.no_grad():
        y, exact = ours.float()(x), theirs(x.double())
    assert y.dtype == dtype
    # One rounding of the output; float32 parameters and statistics add a few of 6e-8.
    bound = torch.finfo(dtype).eps + 1e-6
    assert float((y.double() - exact).abs().max()) <= bound * float(exact.abs().max())
    half = SwitchableNorm2d(3).to(dtype)
    assert half.running_var.dtype == torch.float32
    x = torch.randn(4, 3, 2, 2, dtype=dtype, requires_grad=True)
    half(x).sum().backward()
    assert x.grad.dtype == dtype and half.mean_logits.grad.dtype == dtype


def test_large_mean_in_float32() -> None:
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 1000.0
    ours, theirs = SwitchableNorm2d(3), Paper(3)
    nn.init.zeros_(theirs.bias)
    # The input itself is rounded to 6e-5; the instance means to as much again.
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=0, atol=5e-4)


def test_gradcheck() -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    logits = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    affine = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(*args: Tensor) -> Tensor:
        return switchable_norm(*args, training=True)

    assert torch.autograd.gradcheck(run, (x, *logits, *affine))
    assert torch.autograd.gradgradcheck(run, (x, *logits, *affine))


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
    assert float(ours.weight.grad.abs().max()) == 0.0


def test_copies_states_and_contexts() -> None:
    layer, _ = pair((8, 3, 4, 5))
    x = whole_batch((8, 3, 4, 5))[0]
    layer(x)
    fresh = SwitchableNorm2d(3, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin.eval()(x), layer.eval()(x))
    layer.train()
    before = layer.running_mean.clone()
    with syncnorm.no_stats_update(layer):
        layer(x + 5)
    assert torch.equal(layer.running_mean, before) and layer.track_running_stats
    layer.reset_parameters()
    assert float(layer.running_mean.abs().max()) == 0 and len(set(layer.var_logits.tolist())) == 1


def test_a_model_with_it_converts_and_reverts_around_it() -> None:
    import warnings

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), SwitchableNorm2d(3, process_group="node"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncnorm.convert(model, strict=True)
        assert [type(m) for m in model[1:]] == [syncnorm.SyncBatchNorm2d, SwitchableNorm2d]
        assert [(row.type, row.group, row.notes) for row in syncnorm.inspect(model).rows][1] == (
            "SwitchableNorm2d",
            "node",
            (),
        )
        explained = syncnorm.explain(model)
        assert (
            "2: SwitchableNorm2d, batch statistics as one part of several\n  group    node: no process group"
            in explained
        )
        assert "not synchronised" not in explained
        syncnorm.revert(model)
    assert [type(m) for m in model[1:]] == [nn.BatchNorm2d, SwitchableNorm2d]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_once(use_reentrant: bool) -> None:
    ours, plain = pair((8, 3, 4, 5))[0], pair((8, 3, 4, 5))[0]
    a, b = (whole_batch((8, 3, 4, 5))[0].requires_grad_() for _ in range(2))
    checkpoint(ours, a, use_reentrant=use_reentrant).pow(3).sum().backward()
    plain(b).pow(3).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


def _compiled(splits: list[int]) -> float:
    shape = (8, 3, 4, 5)
    ours, theirs = pair(shape)
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    x, loss_weight = whole_batch(shape)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y = compiled(a := x[part].clone().requires_grad_())
    (y.pow(3) * loss_weight[part]).sum().backward()
    y, exact = y.detach(), results(theirs, x, loss_weight, second_order=False)
    assert int(ours.num_batches_tracked) == 1
    pairs = [(y, exact["y"][part]), (a.grad, exact["dx"][part]), (ours.running_var, exact["running_var"])]
    return max(
        float((mine - other).abs().max()) / float(exact["dx"].abs().max()) for mine, other in pairs if mine.numel()
    )


@pytest.mark.gloo
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    assert _compiled([8]) <= BOUND
    assert max(run_ranks(_compiled, 2, [3, 5])) <= BOUND
    assert max(run_ranks(_compiled, 2, [0, 8])) <= BOUND


def test_exports_in_evaluation() -> None:
    ours, theirs = pair((8, 3, 4, 5))
    x = whole_batch((8, 3, 4, 5))[0]
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    layer = SwitchableNorm2d(3)
    with pytest.raises(
        ValueError, match=r"SwitchableNorm2d: expected 3 channels in dim 1, got an input \[2, 5, 2, 2\]"
    ):
        layer(torch.randn(2, 5, 2, 2))
    with pytest.raises(ValueError, match=r"of 4 dims, got \[2, 3, 2\]"):
        layer(torch.randn(2, 3, 2))
    with pytest.raises(TypeError, match="expected a floating-point input"):
        layer(torch.ones(2, 3, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"both have 3 elements .* or both 2 .*, got \[3\] and \[2\]"):
        switchable_norm(torch.randn(2, 3), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        SwitchableNorm1d(3, eps=0.0)


def _one_rank_refuses() -> None:
    layer = SwitchableNorm2d(3)
    layer(torch.randn(2, 3 + dist.get_rank(), 2, 2))


@pytest.mark.gloo
def test_an_input_refused_on_one_rank_is_told_to_the_others() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_one_rank_refuses, 2)
    assert "1 of 2 ranks refused their input" in caught.value.errors[0]
    assert "expected 3 channels" in caught.value.errors[1]
