"""Tier: gloo ranks. Moments over ranks with their gradients, against autograd of the plain formula on the whole batch."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.groups import LOCAL, Group, GroupSpec, resolve
from syncnorm.functional._samples import instance_moments
from syncnorm.functional._sync_moments import sync_moments
from syncnorm.testing import RankError, count_collectives, run_ranks
from tests.oracles import my_slice, whole_batch

# Float64, some tens of values of size 10 per channel: a few dozen roundings of 1e-16, relative to the largest result.
BOUND = 1e-12

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    deviation = x - mean.view(-1, *[1] * (x.dim() - 2))
    return mean, deviation.square().mean(dims)


def direct(group: Group, **options: object) -> Moments:
    return lambda x: sync_moments(x, group, **options)


def by_parts(group: Group, **options: object) -> Moments:
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = instance_moments(x)
        return sync_moments(mean, group, within=var, size=x[0, 0].numel() if x.size(0) else 0, **options)

    return moments


def derivatives(moments: Moments, x: Tensor, loss_weight: Tensor, order: int) -> list[Tensor]:
    """μ, σ² and the first ``order`` derivatives of a loss that uses both with weights of its own on every sample."""
    x = x.detach().requires_grad_()
    mean, var = moments(x)
    wide = [-1, *[1] * (x.dim() - 2)]
    loss = ((x - mean.view(wide)).pow(3) * loss_weight * (var + 0.1).rsqrt().view(wide)).sum()
    out = [mean.detach(), var.detach()]
    for turn in range(order):
        (slope,) = torch.autograd.grad(loss, x, create_graph=turn < order - 1)
        out.append(slope.detach())
        loss = (slope.square() * loss_weight).sum()
    return out


def differences(mine: list[Tensor], whole: list[Tensor], part: slice) -> list[float]:
    out = []
    for index, exact in enumerate(whole):
        scale = max(float(exact.abs().max()), 1.0)
        expected = exact if index < 2 else exact[part]
        assert mine[index].shape == expected.shape
        out.append(float((mine[index] - expected).abs().max()) / scale if expected.numel() else 0.0)
    return out


SHAPES = [(8, 3), (8, 3, 5), (8, 3, 4, 5), (8, 1, 1, 1)]


def _over_ranks(splits: list[int]) -> list[float]:
    group = resolve(GroupSpec())
    worst = []
    for shape in SHAPES:
        x, loss_weight = whole_batch(shape)
        part = my_slice(splits)
        exact = derivatives(plain, x, loss_weight, 3)
        for moments in (direct(group), by_parts(group)):
            worst += differences(derivatives(moments, x[part], loss_weight[part], 3), exact, part)
    return worst


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[4, 4], [5, 0, 3], [1, 1, 0, 6]], ids=str)
def test_ranks_equal_the_whole_batch_to_the_third_derivative(splits: list[int]) -> None:
    for worst in run_ranks(_over_ranks, len(splits), splits):
        assert max(worst) <= BOUND


def _uneven_maps() -> list[float]:
    """Rank 0 has two samples of 3 values, rank 1 one of 7, given as parts of different sizes."""
    x = torch.randn(1, 2, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    loss_weight = torch.randn_like(x)
    dist.broadcast(loss_weight, 0)
    exact = derivatives(plain, x, loss_weight, 2)
    pieces = [slice(0, 6), slice(6, 13)][dist.get_rank()]
    shape = [(2, 2, 3), (1, 2, 7)][dist.get_rank()]
    cut = lambda t: t[:, :, pieces].reshape(2, shape[0], -1).transpose(0, 1).contiguous()  # noqa: E731
    mine = derivatives(by_parts(resolve(GroupSpec())), cut(x), cut(loss_weight), 2)
    expected = [*exact[:2], *(cut(t) for t in exact[2:])]
    return differences(mine, expected, slice(None))


@pytest.mark.gloo
def test_maps_of_other_sizes_count_by_their_values() -> None:
    for worst in run_ranks(_uneven_maps, 2):
        assert max(worst) <= BOUND


def _local_only_differs() -> float:
    x, loss_weight = whole_batch((8, 3, 4, 5))
    part = my_slice([5, 3])
    exact = derivatives(plain, x, loss_weight, 1)
    return max(differences(derivatives(direct(LOCAL), x[part], loss_weight[part], 1), exact, part))


@pytest.mark.gloo
def test_negative_control_moments_of_one_rank_fail() -> None:
    assert min(run_ranks(_local_only_differs, 2)) > 1e-3


def test_alone_it_is_the_plain_formula() -> None:
    for shape in SHAPES:
        x, loss_weight = whole_batch(shape)
        for moments in (direct(LOCAL), by_parts(LOCAL)):
            mine = derivatives(moments, x, loss_weight, 3)
            assert max(differences(mine, derivatives(plain, x, loss_weight, 3), slice(None))) <= BOUND


@pytest.mark.parametrize("moments", [direct(LOCAL), by_parts(LOCAL)])
def test_gradcheck(moments: Moments) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moments, x)
    assert torch.autograd.gradgradcheck(moments, x)


def test_float32_variance_survives_a_large_mean() -> None:
    x = torch.randn(16, 3, 20, generator=torch.Generator().manual_seed(0)) + 1000.0
    for moments in (direct(LOCAL), by_parts(LOCAL)):
        mean, var = moments(x)
        exact_mean, exact_var = plain(x.double())
        # The mean of 20 to 320 float32 values is exact to 1 ulp of 1000; its square is what the variance may be off by.
        torch.testing.assert_close(mean, exact_mean, rtol=2e-7, atol=0)
        torch.testing.assert_close(var, exact_var, rtol=1e-5, atol=0)


def _running(channels: int = 3) -> RunningStatistics:
    zeros = torch.zeros(channels, dtype=torch.float64)
    return RunningStatistics(zeros, torch.ones_like(zeros), torch.tensor(0), 0.1)


def _bookkeeping() -> dict[str, object]:
    group = resolve(GroupSpec())
    x = whole_batch((8, 3, 4, 5))[0][my_slice([6, 2])].requires_grad_()
    out: dict[str, object] = {}
    for reentrant in (True, False):
        for site in (object(), None):
            plain_run, checked_run = _running(), _running()
            with count_collectives() as plain_counts:
                mean, var = sync_moments(x, group, running=plain_run, site=site)
                (exact,) = torch.autograd.grad((mean * var).sum(), x)
            twin = x.detach().clone().requires_grad_()
            with count_collectives() as counts:
                loss = checkpoint(
                    lambda t, r=checked_run, s=site: torch.mul(*sync_moments(t * 1, group, running=r, site=s)).sum(),
                    twin,
                    use_reentrant=reentrant,
                )
                loss.backward()
            assert counts == plain_counts == {"all_reduce": 2}
            assert torch.equal(twin.grad, exact)
            assert int(checked_run.num_batches_tracked) == 1
            assert torch.equal(checked_run.var, plain_run.var) and torch.equal(checked_run.mean, plain_run.mean)
            out["var"] = plain_run.var.numpy().tobytes()
    with torch.no_grad(), count_collectives() as counts:
        sync_moments(x, group)
    assert counts == {"all_reduce": 1}
    empty = sync_moments(x[:0], group)
    assert torch.equal(torch.stack(empty), torch.zeros(2, 3, dtype=torch.float64))
    return out


@pytest.mark.gloo
def test_a_checkpoint_updates_once_and_meets_no_more_often() -> None:
    first, second = run_ranks(_bookkeeping, 2)
    assert first == second
    x = whole_batch((8, 3, 4, 5))[0]
    expected = torch.ones(3, dtype=torch.float64).lerp(x.transpose(0, 1).flatten(1).var(1), 0.1)
    got = torch.frombuffer(bytearray(first["var"]), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def _one_value(refuse: bool) -> list[float]:
    group, running = resolve(GroupSpec()), _running()
    x = torch.full((1 - dist.get_rank(), 3), 2.0, dtype=torch.float64)
    try:
        mean, var = sync_moments(x, group, running=running, refuse_one_value=refuse)
    finally:
        assert int(running.num_batches_tracked) == 0 and float(running.var.sum()) == 3.0
    return [*mean.tolist(), *var.tolist()]


@pytest.mark.gloo
def test_one_value_has_no_variance_and_is_refused_where_asked() -> None:
    assert run_ranks(_one_value, 2, False) == [[2.0] * 3 + [0.0] * 3] * 2
    with pytest.raises(RankError) as caught:
        run_ranks(_one_value, 2, True)
    assert len(caught.value.errors) == 2
    assert all("expected more than 1 value per channel in the whole group" in e for e in caught.value.errors.values())


def _disagree() -> None:
    x = torch.randn(2, 3, requires_grad=dist.get_rank() == 0)
    sync_moments(x, resolve(GroupSpec()))


@pytest.mark.gloo
def test_ranks_that_disagree_on_the_backward_are_told() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_disagree, 2)
    assert all("1 of 2 ranks need a backward pass" in error for error in caught.value.errors.values())


def _compiled(splits: list[int]) -> float:
    group = resolve(GroupSpec())
    x, loss_weight = whole_batch((8, 3, 4, 5))
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    running = _running()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return sync_moments(x, group, running=running)

    mine = derivatives(moments, x[part], loss_weight[part], 1)
    expected = torch.ones(3, dtype=torch.float64).lerp(x.transpose(0, 1).flatten(1).var(1), 0.1)
    torch.testing.assert_close(running.var, expected, rtol=1e-12, atol=0)
    return max(differences(mine, derivatives(plain, x, loss_weight, 1), part))


@pytest.mark.gloo
def test_compiled_in_one_graph() -> None:
    assert _compiled([8]) <= BOUND
    assert max(run_ranks(_compiled, 2, [3, 5])) <= BOUND
    assert max(run_ranks(_compiled, 2, [0, 8])) <= BOUND
