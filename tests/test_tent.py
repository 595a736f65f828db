"""Tier: gloo ranks. TENT against its loop written out with autograd and torch's Adam, over ranks, and what it leaves behind."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import syncnorm
from syncnorm import TentAdapter
from syncnorm.functional import softmax_entropy
from syncnorm.modules import BatchRenorm1d, FrozenBatchNorm1d
from syncnorm.testing import count_collectives, run_ranks


def net(norm=nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3), norm(3)).double()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model.train()


def data(n: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def by_hand(model: nn.Sequential, batches: list[Tensor], lr: float = 1e-3) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The paper's loop for this network, with functional calls and nothing of ours."""
    w = {name: value.detach().clone() for name, value in model.state_dict().items()}
    affine = [w[name].requires_grad_() for name in ("1.weight", "1.bias", "5.weight", "5.bias")]
    optimizer, outputs = torch.optim.Adam(affine, lr=lr), []
    for x in batches:
        h = F.batch_norm(F.linear(x, w["0.weight"], w["0.bias"]), None, None, affine[0], affine[1], True)
        y = F.batch_norm(F.linear(h.relu(), w["4.weight"], w["4.bias"]), None, None, affine[2], affine[3], True)
        p = y.softmax(1)
        optimizer.zero_grad()
        (-(p * p.log()).sum(1)).mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs, {name: value.detach() for name, value in w.items()}


def renorm(num_features: int) -> nn.Module:
    return BatchRenorm1d(num_features, eps=1e-5)


NORMS = [nn.BatchNorm1d, syncnorm.SyncBatchNorm1d, renorm]


@pytest.mark.parametrize("norm", NORMS, ids=["torch", "ours", "renorm"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_equals_the_papers_loop(norm, context) -> None:
    model, batches = net(norm), [data(seed=s) for s in range(4)]
    outputs, state = by_hand(model, batches)
    adapter = TentAdapter(model)
    for x, expected in zip(batches, outputs, strict=True):
        with context():
            y = adapter(x * 1.0)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-10)
    assert float(softmax_entropy(adapter(batches[-1])).mean()) < float(softmax_entropy(outputs[-1]).mean())


def snapshot(model: nn.Module) -> dict[str, object]:
    out: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    out |= {f"grad {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    out |= {f"needs {name}": p.requires_grad for name, p in model.named_parameters()}
    out |= {f"training {name}": m.training for name, m in model.named_modules()}
    out |= {f"tracks {name}": m.track_running_stats for name, m in model.named_modules() if hasattr(m, "running_var")}
    return out | {f"r_max {name}": m.r_max for name, m in model.named_modules() if hasattr(m, "r_max")}


def same(a: dict[str, object], b: dict[str, object]) -> list[str]:
    return [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])]


@pytest.mark.parametrize("norm", NORMS, ids=["torch", "ours", "renorm"])
def test_only_the_affine_parameters_change_and_restore_takes_them_back(norm) -> None:
    model = net(norm)
    model[1].weight.requires_grad_(False)
    model[1].eval()
    model(data()).sum().backward()
    before = snapshot(model)
    with TentAdapter(model, lr=0.1) as adapter:
        for seed in range(3):
            adapter(data(seed=seed))
        assert set(same(before, snapshot(model))) == {"1.weight", "1.bias", "5.weight", "5.bias"}
        adapter.reset()
        assert not same(before, snapshot(model))
        adapter(data())
        with pytest.raises(RuntimeError):
            adapter(torch.ones(3, 99, dtype=torch.float64))
        assert len(same(before, snapshot(model))) == 4
    assert not same(before, snapshot(model))
    with pytest.raises(syncnorm.SyncNormError, match=r"has been restored and is done\. Make a new one"):
        adapter(data())


def test_episodic_forgets_between_calls_and_steps_repeat() -> None:
    first = TentAdapter(net(), lr=0.1, episodic=True)
    a, b = first(data()), first(data())
    assert torch.equal(a, b)
    assert not torch.equal(TentAdapter(net(), lr=0.1, steps=2)(data()), a)
    twice = TentAdapter(net(), lr=0.1)
    twice(data())
    torch.testing.assert_close(TentAdapter(net(), lr=0.1, steps=2)(data()), twice(data()))


def test_another_optimizer_and_outputs_that_hold_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x, *, scale):
            return {"logits": self.inner(x) * scale}

    model = Wrapped()
    before = model.inner[5].bias.detach().clone()
    make = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    adapter = TentAdapter(model, optimizer=make, logits=lambda output: output["logits"])
    x = data()
    out = adapter(x, scale=2.0)
    assert not out["logits"].requires_grad

    bias = before.clone().requires_grad_()
    source = net()
    h = F.batch_norm(source[0](x), None, None, source[1].weight, source[1].bias, True).relu()
    y = 2 * F.batch_norm(source[4](h), None, None, source[5].weight, bias, True)
    p = y.softmax(1)
    (gradient,) = torch.autograd.grad(-(p * p.log()).sum(1).mean(), bias)
    torch.testing.assert_close(model.inner[5].bias.detach(), before - gradient)


def test_entropy_of_impossible_classes_and_of_certain_ones() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [500.0, 0.0, 0.0]], requires_grad=True)
    entropy = softmax_entropy(logits)
    torch.testing.assert_close(entropy, torch.tensor([2.0, 1.0]).log())
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert gradient.isfinite().all()
    maps = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.distributions.Categorical(logits=maps.movedim(1, -1)).entropy()
    torch.testing.assert_close(softmax_entropy(maps), expected)
    assert torch.autograd.gradcheck(softmax_entropy, maps) and torch.autograd.gradgradcheck(softmax_entropy, maps)
    assert softmax_entropy(torch.randn(3, 4).half()).dtype == torch.float32
    with pytest.raises(TypeError, match=r"softmax_entropy: expected floating-point logits, got torch\.int64"):
        softmax_entropy(torch.ones(2, 2, dtype=torch.int64))


def _over_ranks(splits: list[int], wrap: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    rank = dist.get_rank()
    model = syncnorm.convert(net())
    adapter = TentAdapter(nn.parallel.DistributedDataParallel(model) if wrap else model, lr=0.01)
    start = sum(splits[:rank])
    outputs = []
    for seed in range(4):
        with count_collectives() as counts:
            outputs.append(adapter(data(sum(splits), seed)[start : start + splits[rank]]))
        assert counts == {"all_reduce": 5}, "two layers forward and backward, and one for the gradients"
    return outputs, model.state_dict()


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[6, 6], [5, 0, 4]], ids=str)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "ddp"])
def test_ranks_equal_one_process(splits: list[int], wrap: bool) -> None:
    outputs, state = by_hand(net(), [data(sum(splits), seed) for seed in range(4)], lr=0.01)
    results = run_ranks(_over_ranks, len(splits), splits, wrap)
    for step, expected in enumerate(outputs):
        # Adam divides by the root of the squared gradient: rounding of 1e-16 grows where gradients are small
        torch.testing.assert_close(torch.cat([r[0][step] for r in results]), expected, rtol=1e-10, atol=1e-10)
    for _, mine in results:
        for name, value in mine.items():
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-10)
            assert torch.equal(value, results[0][1][name])


def test_bad_models_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="adapts weight and bias of batch norms, and the model has none"):
        TentAdapter(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), FrozenBatchNorm1d(2)))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        TentAdapter(net(), steps=0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        TypeError, match=r"needs floating-point logits \[N, K, \*\], got \[48\] .* logits=lambda output"
    ):
        TentAdapter(model)(data().float())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
