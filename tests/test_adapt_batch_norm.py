"""Tier: gloo ranks. AdaBN against a loop over the layers written out in numpy, against torch with momentum 1, over ranks."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm import adapt_batch_norm
from syncnorm.modules import BatchRenorm1d, FrozenBatchNorm1d, GhostBatchNorm1d
from syncnorm.testing import count_collectives, run_ranks


def net(norm=nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3), norm(3)).double()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model.train()


def target(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of a domain that drifts."""
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=(n, 4)) * (1 + step) + 3 * step) for step, n in enumerate(sizes)]


def by_hand(model: nn.Sequential, batches: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Pooled statistics of both norms, each batch normalised by itself."""
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    first, second = [], []
    for batch in batches:
        if len(batch):
            z = batch.numpy() @ w["0.weight"].T + w["0.bias"]
            first.append(z)
            y = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) * w["1.weight"] + w["1.bias"]
            second.append(np.maximum(y, 0) @ w["4.weight"].T + w["4.bias"])
    out = {}
    for name, parts in (("1", first), ("5", second)):
        everything = np.concatenate(parts)
        out |= {f"{name}.running_mean": everything.mean(0), f"{name}.running_var": everything.var(0, ddof=1)}
    return out


def assert_adapted(model: nn.Module, before: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    for name, value in model.state_dict().items():
        if name in expected:
            np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-12)
            assert not torch.allclose(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d,
        nn.SyncBatchNorm,
        syncnorm.SyncBatchNorm1d,
        BatchRenorm1d,
        FrozenBatchNorm1d,
        lambda n: GhostBatchNorm1d(n, virtual_batch_size=2),
        lambda n: nn.BatchNorm1d(n, affine=True, momentum=None),
    ],
    ids=["torch", "torch sync", "ours", "renorm", "frozen", "ghost", "cumulative"],
)
def test_statistics_are_the_pooled_ones_of_the_target(norm) -> None:
    model, batches = net(norm), target(6, 3, 0, 20)
    for layer in (model[1], model[5]):
        layer.eps = 1e-5
    before = copy.deepcopy(model.state_dict())
    buffers = [id(buffer) for buffer in model.buffers()]
    assert adapt_batch_norm(model, [(x, "label") for x in batches]) == 29
    assert_adapted(model, before, by_hand(model, batches))
    assert all(module.training for module in model.modules()), "the mode comes back"
    assert [id(buffer) for buffer in model.buffers()] == buffers, "written in place"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_batch_is_torchs_own_training_step_with_momentum_one() -> None:
    model, (x,) = net(), target(12)
    model[3].p = 0.0
    twin = copy.deepcopy(model)
    for layer in (twin[1], twin[5]):
        layer.momentum = 1.0
    twin(x)
    adapt_batch_norm(model, [x])
    for name, value in twin.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_images_and_float32_and_large_means() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(50, 3, 5, 4) + torch.tensor([0.0, 10.0, 1000.0]).view(1, 3, 1, 1)
    assert adapt_batch_norm(model, x.split(7)) == 50
    torch.testing.assert_close(model[0].running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


def test_a_shared_layer_pools_its_calls_and_an_unused_one_keeps_its_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()
            self.alias, self.unused = self.norm, nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x), self.alias(x * 3 + 1)

    model, (x, y) = Twice(), target(5, 9)
    adapt_batch_norm(model, [x, y])
    both = torch.cat([x, x * 3 + 1, y, y * 3 + 1])
    torch.testing.assert_close(model.norm.running_mean, both.mean(0))
    torch.testing.assert_close(model.norm.running_var, both.var(0))
    assert model.unused.running_var.eq(1).all()


def test_dict_batches_compiled_models_and_half_precision() -> None:
    model, batches = net(), target(8, 9)
    expected = by_hand(model, batches)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    model.load_state_dict(net().state_dict())
    before = copy.deepcopy(model.state_dict())
    count = adapt_batch_norm(compiled, [{"x": x} for x in batches], forward=lambda m, batch: m(batch["x"]))
    assert count == 17
    assert_adapted(model, before, expected)
    half = nn.Sequential(nn.BatchNorm1d(4)).bfloat16()
    assert adapt_batch_norm(half, [x.bfloat16() for x in batches]) == 17
    assert half[0].running_mean.dtype == torch.bfloat16


def test_refusals_leave_the_model_as_it_was() -> None:
    model, (x,) = net(), target(6)
    before = copy.deepcopy(model.state_dict())

    def breaks():
        yield x
        raise OSError("disk gone")

    with pytest.raises(ValueError, match="needs at least one sample on some rank, got none"):
        adapt_batch_norm(model, [])
    with pytest.raises(ValueError, match="at least one sample"):
        adapt_batch_norm(model, [x[:0]])
    with pytest.raises(OSError, match="disk gone"):
        adapt_batch_norm(model, breaks())
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) got one value per channel, \[1, 5\], .* drop_last=True"):
        adapt_batch_norm(model, [x, x[:1]])
    with pytest.raises(ValueError, match=r"the inputs of 1 hold NaN or infinite values"):
        adapt_batch_norm(model, [x, x * float("nan")])
    with pytest.raises(TypeError, match=r"got dict. Say how the model is called: forward=lambda model, batch"):
        adapt_batch_norm(model, [{"x": x}])
    with pytest.raises(ValueError, match="needs a batch norm with running statistics, and the model has none"):
        adapt_batch_norm(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), [x])
    with pytest.raises(ValueError, match=r"0 \(LazyBatchNorm1d\) is lazy and has no shape yet"):
        adapt_batch_norm(nn.Sequential(nn.LazyBatchNorm1d()), [x])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def _over_ranks(sizes: list[list[int]]) -> dict[str, bytes]:
    rank = dist.get_rank()
    plain, synced = net(), syncnorm.convert(net())
    wrapped = nn.parallel.DistributedDataParallel(net())
    out = {}
    for kind, model in (("plain", plain), ("synced", synced), ("ddp", wrapped)):
        with count_collectives() as counts:
            assert adapt_batch_norm(model, target(*sizes[rank], seed=rank)) == sum(map(sum, sizes))
        assert counts == {"all_reduce": 1}
        state = (model.module if kind == "ddp" else model).state_dict()
        out |= {f"{kind} {name}": value.numpy().tobytes() for name, value in state.items() if "running" in name}
    return out


@pytest.mark.gloo
@pytest.mark.parametrize("sizes", [[[6, 3], [9]], [[2, 30, 4], [], [5]]], ids=str)
def test_ranks_with_unequally_many_batches_equal_one_process_with_all(sizes: list[list[int]]) -> None:
    expected = by_hand(net(), [batch for rank, s in enumerate(sizes) for batch in target(*s, seed=rank)])
    results = run_ranks(_over_ranks, len(sizes), sizes)
    for per_rank in results:
        assert per_rank == results[0]
        for name, value in per_rank.items():
            np.testing.assert_allclose(np.frombuffer(value), expected[name.split()[1]], rtol=1e-12, atol=1e-12)


def _one_breaks() -> str:
    model, (x,) = net(), target(6)
    before = copy.deepcopy(model.state_dict())
    try:
        adapt_batch_norm(model, [x if dist.get_rank() else x[:1]])
    except (ValueError, syncnorm.SyncNormMismatch) as error:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return str(error)
    return "no error"


@pytest.mark.gloo
def test_a_rank_that_refuses_lets_nobody_wait() -> None:
    first, second = run_ranks(_one_breaks, 2)
    assert "one value per channel" in first
    assert second.startswith("1 of 2 ranks refused their input")


def test_it_helps_on_a_shifted_domain() -> None:
    """The claim of the paper, on inputs whose scale and offset moved."""
    torch.manual_seed(1)
    x, labels = torch.randn(400, 4), torch.arange(400) % 2
    x[:, 0] += labels * 4.0
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    shifted = x * 5 + 20

    def error() -> float:
        return float((model.eval()(shifted).argmax(1) != labels).float().mean())

    before = error()
    adapt_batch_norm(model, shifted.split(100))
    assert before > 0.3 and error() < 0.1
