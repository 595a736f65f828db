"""Tier: gloo ranks. ConditionalNorm against the papers' formulas on the whole batch, around every kind of norm."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.functional import conditional_affine
from syncnorm.modules import ConditionalNorm, GroupNorm, LayerNorm, SwitchableNorm2d
from syncnorm.testing import RankError, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, whole_batch


def plain_batch_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    dims = [d for d in range(x.dim()) if d != 1]
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


class Paper(nn.Module):
    """γ and β of each sample from a linear map, around batch norm of the whole batch."""

    def __init__(self, condition_size: int, channels: int, classes: bool) -> None:
        super().__init__()
        kind = nn.Embedding if classes else nn.Linear
        self.projection = kind(condition_size, 2 * channels, dtype=torch.float64)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        predicted = self.projection(condition)
        c = x.size(1)
        gamma, beta = predicted[:, :c], predicted[:, c:]
        wide = (x.size(0), c, *[1] * (x.dim() - 2))
        return plain_batch_norm(x) * (1 + gamma.reshape(wide)) + beta.reshape(wide)


def step(layer: nn.Module, x: Tensor, condition: Tensor, loss_weight: Tensor) -> dict[str, Tensor]:
    inputs = [x.detach().requires_grad_(), *layer.parameters()]
    if condition.is_floating_point():
        condition = condition.detach().requires_grad_()
        inputs.append(condition)
    y = layer(inputs[0], condition)
    slopes = torch.autograd.grad((y.pow(3) * loss_weight).sum(), inputs, create_graph=True)
    seconds = torch.autograd.grad(slopes[0].square().sum(), inputs)
    names = ["dx", *(f"sum:d{name}" for name, _ in layer.named_parameters())]
    out = {"y": y.detach()}
    for index, name in enumerate(names):
        out[name] = slopes[index].detach()
        out["d" + name if index == 0 else name.replace("sum:", "sum:d")] = seconds[index].detach()
    if condition.is_floating_point():
        out["dcondition"], out["ddcondition"] = slopes[-1].detach(), seconds[-1].detach()
    return out


def condition_for(n: int, classes: bool) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    if classes:
        return torch.randint(0, 5, (n,), generator=generator)
    return torch.randn(n, 5, generator=generator, dtype=torch.float64)


def _over_ranks(splits: list[int]) -> dict[str, float]:
    worst = {}
    for classes in (False, True):
        for shape in ((8, 3), (8, 3, 4, 5), (8, 3, 1, 1)):
            whole = Paper(5, 3, classes)
            randomise_affine(whole)
            options: dict[str, Any] = {"num_classes": 5} if classes else {"cond_dim": 5}
            norm = syncnorm.SyncBatchNorm(3, affine=False, dtype=torch.float64)
            mine = ConditionalNorm(norm, **options)
            mine.projection.load_state_dict(whole.projection.state_dict())
            x, loss_weight = whole_batch(shape)
            condition, part = condition_for(8, classes), my_slice(splits)
            exact = step(whole, x, condition, loss_weight)
            got = step(mine, x[part], condition[part], loss_weight[part])
            for name in ("dcondition", "ddcondition"):
                if name in exact:
                    difference = (got.pop(name) - exact.pop(name)[part]).abs()
                    worst[f"{shape} {name}"] = float(difference.max()) if difference.numel() else 0.0
            worst |= {f"{classes} {shape} {name}": error for name, error in errors(got, exact, part).items()}
    return worst


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[4, 4], [5, 0, 3], [1, 1, 0, 6]], ids=str)
def test_ranks_equal_the_whole_batch_to_the_second_derivative(splits: list[int]) -> None:
    for per_rank in run_ranks(_over_ranks, len(splits), splits):
        # Float64; gradients of cubes reach 1e3, and errors of the condition's are not scaled by that.
        assert not {
            name: error for name, error in per_rank.items() if not error <= 1e-12 * (1e3 if "dcond" in name else 1)
        }


NORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda **o: nn.BatchNorm1d(6, **o), (4, 6)),
    "BatchNorm2d": (lambda **o: nn.BatchNorm2d(6, **o), (4, 6, 3, 5)),
    "SyncBatchNorm3d": (lambda **o: syncnorm.SyncBatchNorm3d(6, **o), (4, 6, 3, 5, 2)),
    "InstanceNorm2d": (lambda **o: nn.InstanceNorm2d(6, **o), (4, 6, 3, 5)),
    "GroupNorm": (lambda **o: nn.GroupNorm(3, 6, **o), (4, 6, 3, 5)),
    "our GroupNorm": (lambda **o: GroupNorm(6, 3, **o), (4, 6, 3, 5)),
    "nn.LayerNorm": (lambda **o: nn.LayerNorm(6, **o), (4, 7, 6)),
    "our LayerNorm over channels": (lambda **o: LayerNorm(6, channel_dim=1, **o), (4, 6, 3, 5)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("classes", [False, True])
def test_begins_as_the_plain_norm_bit_for_bit_and_then_follows_the_condition(name: str, classes: bool) -> None:
    make, shape = NORMS[name]
    norm = make()
    randomise_affine(norm)
    layer = ConditionalNorm(copy.deepcopy(norm), **({"num_classes": 5} if classes else {"cond_dim": 5}))
    x, condition = torch.randn(shape), condition_for(4, classes)
    y = norm(x)
    assert torch.equal(layer(x, condition), y)

    randomise_affine(layer.projection)
    predicted = layer.projection(condition if classes else condition.float()).detach()
    axis = shape[1:].index(6) + 1
    expected = torch.stack(
        [
            y[n].movedim(axis - 1, -1).mul(1 + predicted[n, :6]).add(predicted[n, 6:]).movedim(-1, axis - 1)
            for n in range(4)
        ]
    )
    torch.testing.assert_close(layer.eval().train()(x, condition), expected, rtol=1e-5, atol=1e-5)


def test_with_an_instance_norm_it_is_adain_from_a_condition() -> None:
    """Mean and standard deviation of every output map are what the condition says."""
    layer = ConditionalNorm(nn.InstanceNorm2d(3, eps=0.0, dtype=torch.float64), cond_dim=5, dtype=torch.float64)
    randomise_affine(layer.projection)
    condition = condition_for(4, classes=False)
    y = layer(torch.randn(4, 3, 6, 7, dtype=torch.float64), condition)
    scale, shift = layer.projection(condition).chunk(2, 1)
    torch.testing.assert_close(y.mean((2, 3)), shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.std((2, 3), correction=0), (1 + scale).abs(), rtol=1e-12, atol=1e-12)


def test_gradients_are_right_twice() -> None:
    x, scale, shift = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3), (2, 3)))
    assert torch.autograd.gradcheck(conditional_affine, (x, scale, shift))
    assert torch.autograd.gradgradcheck(conditional_affine, (x, scale, shift))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once_and_takes_a_condition_of_any_dtype(dtype: torch.dtype) -> None:
    x, scale, shift = torch.randn(2, 3, 8) * 100, torch.randn(2, 3), torch.randn(2, 3)
    x = x.to(dtype)
    y = conditional_affine(x, scale, shift)
    assert y.dtype == dtype
    exact = x.double() * (1 + scale.double().unsqueeze(-1)) + shift.double().unsqueeze(-1)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    layer = ConditionalNorm(nn.BatchNorm1d(3, affine=False), cond_dim=5).to(dtype)
    assert layer(x, torch.randn(2, 5, dtype=torch.float64)).dtype == dtype


def test_empty_batch_and_layouts() -> None:
    layer = ConditionalNorm(nn.GroupNorm(1, 3), cond_dim=5)
    assert layer(torch.randn(0, 3, 2, 2), torch.randn(0, 5)).shape == (0, 3, 2, 2)
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    y = conditional_affine(x, torch.randn(2, 3), torch.randn(2, 3))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{"cond_dim": 5}, {"num_classes": 5}], ids=str)
def test_compiles_in_one_graph_and_survives_copies(options: dict[str, int]) -> None:
    layer = ConditionalNorm(syncnorm.SyncBatchNorm2d(3, affine=False), **options)
    randomise_affine(layer.projection)
    x, condition = torch.randn(4, 3, 2, 2), condition_for(4, "num_classes" in options)
    twins = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        ConditionalNorm(nn.BatchNorm2d(3, affine=False), **options),
    ]
    twins[2].load_state_dict(layer.state_dict())
    expected = layer(x, condition)
    for twin in twins:
        torch.testing.assert_close(twin(x, condition), expected, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, condition)
    torch.testing.assert_close(compiled, expected)
    exported = torch.export.export(layer.eval(), (x, condition)).module()
    torch.testing.assert_close(exported(x, condition), layer(x, condition))


def test_the_wrapped_norm_converts_and_reverts() -> None:
    layer = ConditionalNorm(nn.BatchNorm2d(3, affine=False), cond_dim=5)
    syncnorm.convert(layer)
    assert type(layer.norm) is syncnorm.SyncBatchNorm2d
    syncnorm.revert(layer)
    assert type(layer.norm) is nn.BatchNorm2d
    assert "cond_dim=5" in repr(layer)


def test_bad_conditions_are_refused() -> None:
    x = torch.randn(4, 3, 2, 2)
    vector = ConditionalNorm(nn.BatchNorm2d(3), cond_dim=5)
    with pytest.raises(
        ValueError,
        match=r"ConditionalNorm\(BatchNorm2d\): expected a condition \[N, cond_dim\] = \[4, 5\] for an input \[4, 3, 2, 2\], "
        r"got \[4, 7\]",
    ):
        vector(x, torch.randn(4, 7))
    with pytest.raises(ValueError, match=r"got \[3, 5\]"):
        vector(x, torch.randn(3, 5))
    with pytest.raises(TypeError, match="For class indices, construct with num_classes="):
        vector(x, torch.zeros(4, 5, dtype=torch.int64))
    indices = ConditionalNorm(nn.BatchNorm2d(3), num_classes=5)
    with pytest.raises(TypeError, match=r"For one-hot rows, pass condition\.argmax\(1\)"):
        indices(x, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"one class index per sample, \[N\] = \[4\].*got \[4, 1\]"):
        indices(x, torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"class indices must be in \[0, 5\), as num_classes says; got 0 to 5"):
        indices(x, torch.tensor([0, 1, 5, 2]))
    assert int(indices.norm.num_batches_tracked) == int(vector.norm.num_batches_tracked) == 0


def test_bad_constructions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"either cond_dim .* or num_classes .*, got cond_dim=None, num_classes=None"):
        ConditionalNorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="got cond_dim=4, num_classes=5"):
        ConditionalNorm(nn.BatchNorm2d(3), 4, num_classes=5)
    with pytest.raises(ValueError, match="cond_dim must be at least 1, got 0"):
        ConditionalNorm(nn.BatchNorm2d(3), 0)
    with pytest.raises(ValueError, match="cannot tell how many channels Identity has: pass num_features"):
        ConditionalNorm(nn.Identity(), 4)
    with pytest.raises(ValueError, match="BatchNorm2d has 3 channels, and num_features=4 was given"):
        ConditionalNorm(nn.BatchNorm2d(3), 4, num_features=4)
    with pytest.raises(ValueError, match=r"scale must be \[N, C\] = \[2, 3\].*got \[2, 4\]"):
        conditional_affine(torch.randn(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="channel_dim must be a dim behind the batch's, got 0"):
        conditional_affine(torch.randn(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3), channel_dim=0)
    own = ConditionalNorm(nn.Identity(), 4, num_features=3, channel_dim=2)
    assert own(torch.randn(2, 5, 3), torch.randn(2, 4)).shape == (2, 5, 3)


def _one_rank_refuses(kind: type[nn.Module]) -> None:
    import torch.distributed as dist

    layer = ConditionalNorm(kind(3), cond_dim=5)
    layer(torch.randn(4, 3, 2, 2), torch.randn(4, 5 + dist.get_rank()))


@pytest.mark.gloo
@pytest.mark.parametrize("kind", [syncnorm.SyncBatchNorm2d, SwitchableNorm2d])
def test_a_condition_refused_on_one_rank_is_told_to_the_others(kind: type[nn.Module]) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_one_rank_refuses, 2, kind, timeout=30)
    assert "1 of 2 ranks refused their input" in caught.value.errors[0]
    assert "expected a condition [N, cond_dim] = [4, 5]" in caught.value.errors[1]


@pytest.mark.gloo
def test_a_refused_condition_of_a_norm_that_meets_nobody_is_told_to_nobody() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_one_rank_refuses, 2, syncnorm.FrozenBatchNorm2d, timeout=30)
    assert caught.value.errors.keys() == {1}
    assert "expected a condition [N, cond_dim] = [4, 5]" in caught.value.errors[1]
