"""Tier: gloo ranks. Batch renormalisation against the paper's formulas in torch float64, its two limits, and over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch


class Paper(nn.BatchNorm2d):
    """Algorithm 1 of Ioffe (2017), on one process, with autograd for the gradients."""

    def __init__(self, num_features: int, r_max: float, d_max: float, **options: object) -> None:
        super().__init__(num_features, **options)
        self.r_max, self.d_max = r_max, d_max

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        wide = [1 if d != 1 else -1 for d in range(x.dim())]
        mean, var = x.mean(dims), x.var(dims, correction=0)
        sigma_b, sigma = (var + self.eps).sqrt(), (self.running_var + self.eps).sqrt()
        r = (sigma_b / sigma).clamp(1 / self.r_max, self.r_max).detach()
        d = ((mean - self.running_mean) / sigma).clamp(-self.d_max, self.d_max).detach()
        x_hat = (x - mean.view(wide)) / sigma_b.view(wide)
        y = (x_hat * r.view(wide) + d.view(wide)) * self.weight.view(wide) + self.bias.view(wide)
        n = x.numel() / x.size(1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def pair(r_max: float, d_max: float, channels: int = 3, **options: object) -> tuple[BatchRenorm2d, Paper]:
    """Ours and the paper's with the same weights and running statistics that are away from the batch's."""
    theirs = Paper(channels, r_max, d_max, eps=1e-3, momentum=0.01, dtype=torch.float64)
    randomise_affine(theirs)
    theirs.running_mean.copy_(torch.linspace(-1, 2, channels))
    theirs.running_var.copy_(torch.linspace(0.3, 9, channels))
    ours = BatchRenorm2d(channels, r_max=r_max, d_max=d_max, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


LIMITS = [(1.0, 0.0), (1.2, 0.1), (3.0, 5.0), (1e9, 1e9)]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_process_equals_the_paper_to_the_second_derivative(limits: tuple[float, float], backend: str) -> None:
    ours, theirs = pair(*limits, backend=backend)
    x, loss_weight = whole_batch((6, 3, 4, 5))
    for _ in range(3):
        exact = results(theirs, x, loss_weight)
        mine = results(ours, x, loss_weight)
        for name in exact:
            scale = max(float(exact[name].abs().max()), 1.0)
            assert float((mine[name] - exact[name]).abs().max()) <= 1e-12 * scale, name


def _over_ranks(splits: list[int]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for limits in LIMITS:
        ours, theirs = pair(*limits)
        x, loss_weight = whole_batch((sum(splits), 3, 4, 5))
        part = my_slice(splits)
        for step in range(2):
            exact = results(theirs, x, loss_weight)
            with count_collectives() as counts:
                mine = results(ours, x[part], loss_weight[part], second_order=False)
            assert counts == {"all_reduce": 2}
            ours.load_state_dict({name: exact.get(name, value) for name, value in ours.state_dict().items()})
            kept = {name: value for name, value in exact.items() if not name.startswith(("ddx", "sum:dd"))}
            worst |= {f"{limits} {step} {name}": error for name, error in errors(mine, kept, part).items()}
    return worst


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[4, 4], [5, 0, 3], [1, 1, 1, 1]], ids=str)
def test_ranks_equal_the_whole_batch(splits: list[int]) -> None:
    for per_rank in run_ranks(_over_ranks, len(splits), splits):
        assert not {name: error for name, error in per_rank.items() if error > 1e-12}


def test_without_correction_it_is_batch_norm() -> None:
    x, loss_weight = whole_batch((6, 3, 4, 5))
    ours, plain = pair(1.0, 0.0)[0], nn.BatchNorm2d(3, eps=1e-3, momentum=0.01, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    exact, mine = results(plain, x, loss_weight), results(ours, x, loss_weight)
    for name in exact:
        torch.testing.assert_close(mine[name], exact[name], rtol=1e-11, atol=1e-11)


def test_unclipped_training_output_is_evaluation_before_the_update() -> None:
    ours, _ = pair(1e9, 1e9)
    x, _ = whole_batch((6, 3, 4, 5))
    evaluated = ours.eval()(x)
    trained = ours.train()(x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-12, atol=1e-12)
    assert ours.clip_rate == (0.0, 0.0)
    ours.r_max, ours.d_max = 1.0, 0.0
    ours(x)
    assert ours.clip_rate == (1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    ours, theirs = pair(3.0, 5.0)
    x, _ = whole_batch((6, 3, 4, 5))
    x = x.to(dtype)
    with torch.no_grad():
        exact, mine = theirs(x.double()), ours.float()(x)
    assert mine.dtype == dtype
    assert float((mine.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_corrects_as_the_forward_did_and_updates_once(use_reentrant: bool) -> None:
    ours, _ = pair(1.2, 0.1)
    plain, _ = pair(1.2, 0.1)
    x, _ = whole_batch((6, 3, 4, 5))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    checkpoint(ours, a, use_reentrant=use_reentrant).pow(3).sum().backward()
    plain(b).pow(3).sum().backward()
    assert torch.equal(a.grad, b.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_compiled_step_equals_eager_and_limits_move_without_recompilation() -> None:
    ours, _ = pair(1.2, 0.1)
    eager, _ = pair(1.2, 0.1)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, _ = whole_batch((6, 3, 4, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for r_max in (1.2, 1.5, 3.0):
            ours.r_max = eager.r_max = r_max
            a, b = (x.clone().requires_grad_() for _ in range(2))
            compiled(a).pow(3).sum().backward()
            eager(b).pow(3).sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
            for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_state_is_batch_norms_and_survives_casts_and_copies() -> None:
    import copy
    import pickle

    layer = BatchRenorm1d(4, r_max=2.0, d_max=1.0)
    assert set(layer.state_dict()) == set(nn.BatchNorm1d(4).state_dict())
    layer.bfloat16()
    assert layer._limits.dtype == torch.float64
    assert layer.running_var.dtype == torch.float32
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.r_max, twin.d_max) == (2.0, 1.0)
    assert "r_max=2, d_max=1" in repr(BatchRenorm3d(4, r_max=2.0, d_max=1.0))
    model = nn.Sequential(BatchRenorm2d(4))
    syncnorm.revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert not [name for name, _ in model.named_buffers() if "limits" in name or "clip" in name]


def test_bad_limits_and_missing_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"r_max must be at least 1 \(1 is no correction\), got 0\.5"):
        BatchRenorm2d(3, r_max=0.5)
    with pytest.raises(ValueError, match=r"d_max must be at least 0 \(0 is no correction\), got -1"):
        BatchRenorm2d(3, d_max=-1.0)
    layer = BatchRenorm2d(3)
    with pytest.raises(
        ValueError, match=r"BatchRenorm2d\(3\): expected 3 channels in dim 1, got an input \[2, 5, 2, 2\]"
    ):
        layer(torch.randn(2, 5, 2, 2))
    layer.running_mean = None
    with pytest.raises(syncnorm.SyncNormError, match="corrects towards running statistics, and they have been removed"):
        layer(torch.randn(2, 3, 2, 2))


def _same_bits() -> list[bytes]:
    torch.manual_seed(dist.get_rank())
    layer = BatchRenorm1d(7)
    for _ in range(4):
        layer(torch.randn(3 + dist.get_rank(), 7))
    return [layer.running_mean.numpy().tobytes(), layer.running_var.numpy().tobytes()]


@pytest.mark.gloo
def test_running_statistics_are_the_same_bits_on_all_ranks() -> None:
    first, *others = run_ranks(_same_bits, 3)
    assert all(other == first for other in others)
