"""Tier: gloo ranks. Running statistics of ranks pooled by the law of total variance, against numpy on the samples."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm import reduce_buffers
from syncnorm.core.running import pool_running
from syncnorm.testing import count_collectives, run_ranks

pytestmark = pytest.mark.gloo


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, momentum=None),
        nn.Linear(5, 3),
        nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)),
        nn.BatchNorm1d(3, track_running_stats=False),
    )


def test_means_apart_count_as_variance() -> None:
    # Two populations of variance 1 around -2 and +2: E[var] + Var[mean] = 1 + 4. The mean of the variances says 1.
    mean, var = pool_running(torch.tensor([[-2.0], [2.0]]).double(), torch.ones(2, 1).double(), torch.ones(2).double())
    assert (mean.item(), var.item()) == (0.0, 5.0)


def test_equal_rows_stay_the_bits_they_are() -> None:
    row = torch.tensor([[0.1, 1e9, 1 / 3]], dtype=torch.float64)
    mean, var = pool_running(row.expand(3, -1), row.expand(3, -1), torch.tensor([7.0, 3.0, 11.0]).double())
    assert torch.equal(mean, row[0]) and torch.equal(var, row[0])


def _two_means_apart(kind: str) -> tuple[float, float, int]:
    layer: nn.Module = nn.BatchNorm1d(1) if kind != "ours" else syncnorm.SyncBatchNorm1d(1)
    model: nn.Module = nn.Sequential(layer)
    model = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    layer.running_mean.fill_(4.0 * dist.get_rank() - 2.0)
    layer.num_batches_tracked.fill_(3 + dist.get_rank())
    assert reduce_buffers(model) == 1
    return layer.running_mean.item(), layer.running_var.item(), int(layer.num_batches_tracked)


@pytest.mark.parametrize("kind", ["torch", "ours", "ddp"])
def test_two_ranks_of_variance_1_at_distance_4_have_variance_5(kind: str) -> None:
    assert run_ranks(_two_means_apart, 2, kind) == [(0.0, 5.0, 4)] * 2


def _trained(steps: list[int]) -> dict[str, np.ndarray]:
    rank, model = dist.get_rank(), net()
    rng = np.random.default_rng(rank)
    seen = [torch.tensor(rng.normal(size=(6, 4)) + rank, dtype=torch.float32) for _ in range(steps[rank])]
    for x in seen:
        model[1](model[0](x))
    with torch.no_grad():
        model[3][0].running_mean += rank + 1
        model[3][0].running_var *= rank + 1
    model[3][0].num_batches_tracked += rank  # rank 0 has seen nothing of it
    before = copy.deepcopy(model.state_dict())
    with count_collectives() as counts:
        assert reduce_buffers(model) == 2
    assert counts == {"all_reduce": 1}
    after = model.state_dict()
    for name, value in before.items():
        pooled = name.startswith(("1.running", "1.num", "3.0.running", "3.0.num"))
        assert pooled or torch.equal(value, after[name]), name
    once = copy.deepcopy(after)
    reduce_buffers(model)
    assert all(torch.equal(once[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        local = np.array([model[0](x).numpy() for x in seen]).reshape(-1, 6, 5)
    return {name: value.numpy().copy() for name, value in after.items()} | {"local": local}


def test_cumulative_averages_count_by_batches_and_fresh_ranks_not_at_all() -> None:
    first, *others = run_ranks(_trained, 3, [2, 5, 0])
    for other in others:
        assert all(other[name].tobytes() == value.tobytes() for name, value in first.items() if name != "local")
    batches = np.concatenate(
        [first["local"], *(other["local"] for other in others)]
    )  # [7, 6, 5]: 2 of one rank, 5 of another
    parts = [batches[:2], batches[2:]]
    means = [part.mean((0, 1)) for part in parts]
    variances = [part.var(1, ddof=1).mean(0) for part in parts]
    mean = (2 * means[0] + 5 * means[1]) / 7
    var = sum(n * (v + (m - mean) ** 2) for n, v, m in zip((2, 5), variances, means, strict=True)) / 7
    np.testing.assert_allclose(first["1.running_mean"], mean, rtol=2e-6, atol=1e-6)  # float32 buffers
    np.testing.assert_allclose(first["1.running_var"], var, rtol=2e-6)
    assert first["1.num_batches_tracked"] == 5
    # means 2 and 3, variances 2 and 3 of the ranks 1 and 2
    np.testing.assert_allclose(first["3.0.running_mean"], 2.5, rtol=1e-7)
    np.testing.assert_allclose(first["3.0.running_var"], 2.5 + 0.25, rtol=1e-7)


def _wide() -> tuple[int, float]:
    layer = nn.BatchNorm1d(300)
    with torch.no_grad():
        layer.running_mean.copy_(torch.arange(300.0) * dist.get_rank())
    with count_collectives() as counts:
        reduce_buffers(layer)
    assert layer.running_mean.tolist() == [0.5 * c for c in range(300)]
    return sum(counts.values()), layer.running_var[299].item()


def test_a_wide_model_takes_two_gathers() -> None:
    assert run_ranks(_wide, 2) == [(2, 1 + 149.5**2)] * 2


def _wrong(case: str) -> str:
    rank, model = dist.get_rank(), net()
    if case == "wider" and rank:
        model[1] = nn.BatchNorm1d(400)
    if case == "swapped" and rank:
        model[1], model[3][0] = nn.BatchNorm1d(3), nn.BatchNorm1d(5)
    if case == "nan" and rank:
        model[1].running_mean[2] = torch.nan
    if case == "negative" and rank:
        model[1].running_var[1] = -1
    before = copy.deepcopy(model.state_dict())
    try:
        reduce_buffers(model)
        return "no error"
    except (ValueError, syncnorm.SyncNormMismatch) as error:
        assert all(np.array_equal(v, before[n], equal_nan=True) for n, v in model.state_dict().items())
        said = f"{type(error).__name__}: {error}"
    reduce_buffers(net())  # the group still works
    return said


@pytest.mark.parametrize(
    ("case", "one", "other"),
    [
        ("wider", "ranks [0] in a gather of 19 words; ranks [1] in a gather of 809 words", None),
        ("swapped", "SyncNormMismatch: ranks must have the same batch norms in the same order", None),
        (
            "nan",
            "SyncNormMismatch: 1 of 2 ranks refused their input to this call (ranks [1]",
            "ValueError: 1 (BatchNorm1d): running_mean is not finite in channel [2] of 5 (nan), which would spread",
        ),
        (
            "negative",
            "SyncNormMismatch: 1 of 2 ranks refused their input to this call (ranks [1]",
            "ValueError: 1 (BatchNorm1d): running_var is negative in channel [1] of 5 (-1), which would spread",
        ),
    ],
)
def test_every_rank_raises_and_nothing_is_written(case: str, one: str, other: str | None) -> None:
    first, second = run_ranks(_wrong, 2, case)
    assert one in first
    assert (other or one) in second


def test_a_lone_process_keeps_what_it_has() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    assert reduce_buffers(model) == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert reduce_buffers(nn.Linear(2, 2)) == 0
