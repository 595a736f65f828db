"""Tier: no process. Metrics of norms against float64 numpy over the whole batch; what is below is run over ranks elsewhere."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MetricCollection

import syncnorm
from syncnorm.diagnostics import (
    DeadChannels,
    EffectiveBatch,
    ExchangeCost,
    NormProbe,
    RenormClipRate,
    RunningStatDrift,
    TrainEvalGap,
)
from syncnorm.diagnostics._norm_metrics import meet
from syncnorm.distributed import observers
from syncnorm.distributed.groups import GroupSpec, resolve
from syncnorm.modules import EvoNormB0, SwitchableNorm2d
from syncnorm.testing import count_collectives

METRICS = (DeadChannels, EffectiveBatch, ExchangeCost, RenormClipRate, RunningStatDrift, TrainEvalGap)
C = 5


def data(*sizes: int, space: tuple[int, ...] = (3, 2)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(n, C, *space, generator=generator, dtype=torch.float64) * 3 + 7 for n in sizes]


def flat(x: Tensor) -> np.ndarray:
    """All values of each channel, [C, n]."""
    return x.detach().transpose(0, 1).reshape(C, -1).numpy()


def noise_of(parts: Sequence[Tensor]) -> float:
    whole = np.concatenate([flat(part) for part in parts], 1)
    centre = whole.mean(1, keepdims=True)
    between = sum(flat(p).shape[1] * (flat(p).mean(1) - centre[:, 0]) ** 2 for p in parts if p.numel())
    return float(np.mean(between / ((whole - centre) ** 2).sum(1)))


def gap_of(parts: Sequence[Tensor], mean: np.ndarray, var: np.ndarray, eps: float) -> np.ndarray:
    """By its meaning: x̂ in training against x̂ in evaluation, sample by sample; [C]."""
    whole = np.concatenate([flat(part) for part in parts], 1)
    trained = (whole - whole.mean(1, keepdims=True)) / np.sqrt(whole.var(1, keepdims=True) + eps)
    evaluated = (whole - mean[:, None]) / np.sqrt(var[:, None] + eps)
    return np.sqrt(((trained - evaluated) ** 2).mean(1))


def drift_of(means: np.ndarray, variances: np.ndarray, eps: float) -> np.ndarray:
    """From what ranks hold, [R, C]; by channel."""
    std = np.sqrt(variances + eps)
    apart = np.sqrt(np.ptp(means, 0) ** 2 + np.ptp(std, 0) ** 2)
    return apart / np.sqrt((variances + eps).mean(0))


def watched(model: nn.Module, parts: Sequence[Tensor], *metrics: Any) -> None:
    probe = NormProbe(model)
    for part in parts:
        with probe:
            model(part)
        for metric in metrics:
            metric.update(probe.reading)


def norm(kind: Any = nn.BatchNorm2d, *args: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(kind(C, *args, **options)).double()


# --------------------------------------------------------------------------------------------------------------- the numbers


def test_effective_batch_is_that_of_numpy() -> None:
    parts, model = data(2, 7, 0, 4), norm()
    metric = EffectiveBatch(model)
    watched(model, parts, metric)
    found = metric.compute()
    assert float(found["noise"]) == pytest.approx(noise_of(parts), rel=1e-12)
    assert float(found["batch"]) == 13 * 6 / 3, "the empty batch has no statistic"


def test_noise_of_random_batches_is_one_over_their_size() -> None:
    model = norm(nn.BatchNorm1d)
    for size in (2, 8, 32):
        metric = EffectiveBatch(model)
        watched(model, data(*[size] * 200, space=()), metric)
        # Mean over 5 channels of a χ² with 199 degrees of freedom each: a standard deviation of 4 %.
        assert float(metric.compute()["noise"]) == pytest.approx(1 / size, rel=0.15)


def test_a_single_part_has_no_noise() -> None:
    model = norm()
    metric = EffectiveBatch(model)
    watched(model, data(4), metric)
    assert metric.compute()["noise"].isnan()


def test_gap_is_the_difference_of_training_and_evaluation() -> None:
    parts, model = data(4, 3, 5), norm(momentum=0.0)
    model[0].running_mean += 4
    model[0].running_var *= torch.arange(1.0, C + 1)
    metric = TrainEvalGap(model)
    watched(model, parts, metric)
    exact = gap_of(parts, np.full(C, 4.0), np.arange(1.0, C + 1), model[0].eps)
    found = metric.compute()
    assert float(found["gap"]) == pytest.approx(exact.mean(), rel=1e-10)
    assert float(found["gap_max"]) == pytest.approx(exact.max(), rel=1e-10)


def test_gap_takes_the_statistics_that_a_step_found() -> None:
    (x,), model = data(6), norm(momentum=1.0)
    metric = TrainEvalGap(model)
    watched(model, [x], metric)
    exact = gap_of([x], np.zeros(C), np.ones(C), model[0].eps)
    assert float(metric.compute()["gap"]) == pytest.approx(exact.mean(), rel=1e-10)


def test_gap_of_moving_averages_is_about_their_centre() -> None:
    model = nn.Sequential(syncnorm.MovingAverageBatchNorm2d(C)).double()
    metric = TrainEvalGap(model)
    (x,) = data(6)
    watched(model, [x], metric)
    scale = np.sqrt((flat(x) ** 2).mean(1) + model[0].eps)  # it starts with a mean square of 1 about 0
    start = np.sqrt(1 + model[0].eps)
    exact = np.sqrt((flat(x) ** 2).mean(1)) * np.abs(1 / scale - 1 / start)
    assert float(metric.compute()["gap"]) == pytest.approx(exact.mean(), rel=1e-10)


def test_drift_is_that_of_numpy() -> None:
    models = [norm() for _ in range(3)]
    metrics = [RunningStatDrift(model) for model in models]
    for model, metric, parts in zip(models, metrics, (data(3, 4), data(5), data(2, 2, 2)), strict=True):
        watched(model, parts, metric)
    assert metrics[0].compute() == {"drift": 0, "drift_max": 0}
    metrics[0].merge_state(metrics[1])
    metrics[0].merge_state(metrics[2])
    means, variances = (
        np.stack([getattr(m[0], key).numpy() for m in models]) for key in ("running_mean", "running_var")
    )
    exact = drift_of(means, variances, models[0][0].eps)
    found = metrics[0].compute()
    assert float(found["drift"]) == pytest.approx(exact.mean(), rel=1e-12)
    assert float(found["drift_max"]) == pytest.approx(exact.max(), rel=1e-12)


def test_dead_and_saturated_channels() -> None:
    x, model = data(64)[0], norm()
    x[:, 0] = 3.0
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
        model[0].bias.copy_(torch.tensor([0.0, -3.1, 3.1, 1.0, -2.5]))
    metric = DeadChannels(model)
    watched(model, list(x.split(16)), metric)
    y = flat(model(x))
    assert (y[1] <= 0).mean() > 0.99 and (y[2] >= 0).mean() > 0.99
    assert metric.compute() == {"dead": pytest.approx(3 / 5), "saturated": pytest.approx(1 / 5)}
    # The activation of a fused layer is part of it.
    relu = nn.Sequential(syncnorm.SyncBatchNorm(C, activation="relu")).double()
    relu[0].load_state_dict(model[0].state_dict())
    metric = DeadChannels(relu)
    watched(relu, list(x.split(16)), metric)
    assert metric.compute() == {"dead": pytest.approx(3 / 5), "saturated": pytest.approx(1 / 5)}


def test_clip_rates_are_the_layers() -> None:
    model = nn.Sequential(syncnorm.BatchRenorm2d(C, r_max=1.1, d_max=0.5), nn.BatchNorm2d(C)).double()
    metric, layers, rates = RenormClipRate(model), RenormClipRate(model, per_layer=True), []
    probe = NormProbe(model)
    for x in data(3, 4, 5):
        with probe:
            model(x)
        metric.update(probe.reading)
        layers.update(probe.reading)
        rates.append(model[0].clip_rate)
    exact = np.mean(rates, 0)
    assert exact.max() > 0
    assert metric.compute() == {"clip_r": pytest.approx(exact[0]), "clip_d": pytest.approx(exact[1])}
    assert layers.compute()["clip_d"].isnan().tolist() == [False, True]
    model.eval()
    metric.reset()
    watched(model, data(3), metric)
    assert metric.compute()["clip_r"].isnan(), "nothing is clipped in evaluation"


# --------------------------------------------------------------------------------------------------------- layers of all kinds


@pytest.mark.parametrize(
    "make",
    [
        nn.BatchNorm2d, nn.SyncBatchNorm, syncnorm.SyncBatchNorm, syncnorm.SyncBatchNorm2d, syncnorm.BatchRenorm2d,
        syncnorm.MovingAverageBatchNorm2d, SwitchableNorm2d, EvoNormB0,
        lambda c: nn.BatchNorm2d(c, track_running_stats=False), lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: syncnorm.SyncBatchNorm2d(c, momentum=None),
    ],
    ids=lambda make: getattr(make, "__name__", ""),
)  # fmt: skip
def test_every_norm_of_a_batch_is_seen(make: Any) -> None:
    parts, model = data(4, 3), norm(make)
    batch, gap, drift, dead = (kind(model) for kind in (EffectiveBatch, TrainEvalGap, RunningStatDrift, DeadChannels))
    watched(model, parts, batch, gap, drift, dead)
    assert float(batch.compute()["noise"]) == pytest.approx(noise_of(parts), rel=1e-10)
    assert float(batch.compute()["batch"]) == 7 * 6 / 2
    has_mean = model[0]._buffers.get("running_mean") is not None
    assert bool(gap.compute()["gap"] > 0) == has_mean and bool(drift.compute()["drift"] == 0) == has_mean
    assert 0 <= float(dead.compute()["dead"]) <= 1


def test_ghosts_and_fixed_layers() -> None:
    ghosts, frozen = norm(syncnorm.GhostBatchNorm2d, 2), norm(syncnorm.FrozenBatchNorm2d)
    ghost_batch, frozen_batch = EffectiveBatch(ghosts), EffectiveBatch(frozen)
    watched(ghosts, data(6), ghost_batch)
    assert float(ghost_batch.compute()["batch"]) == 2 * 6
    watched(frozen, data(6), frozen_batch)
    assert frozen_batch.compute()["batch"].isnan(), "it shares no statistic"


def test_calls_of_a_shared_layer_count_together_and_a_recompute_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(C).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[:2]).sum() + checkpoint(self.norm, x[2:], use_reentrant=False).sum()

    model, (x,) = Twice(), data(7)
    metric, probe = EffectiveBatch(model), NormProbe(model)
    with probe:
        model(x.requires_grad_()).backward()
    metric.update(probe.reading)
    assert float(metric.compute()["noise"]) == pytest.approx(noise_of([x[:2], x[2:]]), rel=1e-12)
    assert float(metric.compute()["batch"]) == 7 * 6 / 2


def test_values_under_a_mask_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = syncnorm.SyncBatchNorm2d(C).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=torch.arange(len(x)) < 3)

    model, parts = Masked(), data(5, 4)
    metric = EffectiveBatch(model)
    watched(model, parts, metric)
    assert float(metric.compute()["noise"]) == pytest.approx(noise_of([part[:3] for part in parts]), rel=1e-10)


def test_compiled_code_is_seen_within_a_probe_and_runs_compiled_after() -> None:
    ran: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *args: (ran.append(True), graph(*args))[1]

    model = norm()
    compiled, (x,) = torch.compile(model, backend=backend), data(4)
    compiled(x)
    metric, probe = EffectiveBatch(compiled), NormProbe(compiled)
    ran.clear()
    with probe:
        compiled(x)
    assert not ran
    metric.update(probe.reading)
    assert float(metric.compute()["batch"]) == 24
    compiled(x)
    assert ran == [True]


def test_nothing_stays_on_the_model() -> None:
    model = norm()
    probe = NormProbe(model)
    seen: list[int] = []
    model.append(nn.Identity()).register_forward_hook(lambda *_: seen.append(len(model[0]._forward_hooks)))
    with pytest.raises(ValueError, match="expected 4D input"), probe:
        model(torch.zeros(3, C))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert not observers._observers and probe.reading is None
    with probe:
        model(data(3)[0])
        probe.close()
        model(data(3)[0])
    assert probe.reading is not None and seen == [1, 0]
    other = NormProbe(model)
    probe.__enter__()
    other.__enter__()
    probe.close()  # not the last one that began
    assert len(observers._observers) == 1
    other.close()
    assert not observers._observers and torch._dynamo.eval_frame._stance.stance == "default"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no batch norm to look at"):
        EffectiveBatch(nn.GroupNorm(1, 4))
    metric, probe = EffectiveBatch(norm()), NormProbe(nn.BatchNorm2d(3))
    with probe:
        pass
    with pytest.raises(ValueError, match="norms with 5 channels together, and got the reading of a probe on 3"):
        metric.update(probe.reading)


# --------------------------------------------------------------------------------------------------- as torchmetrics are used


def readings() -> tuple[nn.Module, list[Any]]:
    model = nn.Sequential(syncnorm.BatchRenorm2d(C, r_max=1.1, d_max=0.5), nn.BatchNorm2d(C)).double()
    probe, found = NormProbe(model), []
    for x in data(3, 4, 2, 6):
        with probe:
            model(x)
        found.append(probe.reading)
    return model, found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-12, equal_nan=True) for k in a)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_the_contract_of_torchmetrics(kind: type) -> None:
    model, found = readings()
    whole = kind(model, per_layer=True)
    for reading in found:
        whole.update(reading)
    exact = whole.compute()
    assert {len(value.reshape(-1)) for value in exact.values()} <= {1, 2}

    stepwise, last = kind(model, per_layer=True), kind(model, per_layer=True)
    for reading in found:
        value = stepwise(reading)
    last.update(found[-1])
    assert same(value, last.compute()), "forward gives the value of this update"
    assert same(stepwise.compute(), exact)

    first, second = kind(model, per_layer=True), kind(model, per_layer=True)
    for reading in found[:2]:
        first.update(reading)
    first.compute()
    for reading in found[2:]:
        second.update(reading)
    kept = pickle.loads(pickle.dumps(second))
    first.merge_state(kept)
    if kind is not RunningStatDrift:  # these would be two ranks
        assert same(first.compute(), exact)
        first.reset()
        first.merge_state({"rows": whole.rows})
        assert same(first.compute(), exact)

    clone = copy.deepcopy(whole).half()
    assert clone.rows.dtype == torch.float64
    clone.reset()
    assert all(value.isnan().all() for value in clone.compute().values())
    clone.persistent(True)
    whole.persistent(True)
    clone.load_state_dict(whole.state_dict())
    clone._update_count, clone._computed = 1, None
    assert same(clone.compute(), exact)


def test_a_collection_has_short_keys() -> None:
    model, found = readings()
    collection = MetricCollection([kind(model) for kind in METRICS])
    for reading in found:
        collection.update(reading)
    assert set(collection.compute()) == {
        "dead", "saturated", "batch", "noise", "exchanges", "exchange_kb", "exchange_ms", "clip_r", "clip_d", "drift",
        "drift_max", "gap", "gap_max",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- over ranks


def on_ranks(parts: list[Tensor], synchronised: bool) -> dict[str, Any]:
    x = parts[dist.get_rank()]
    model = norm()
    if synchronised:
        syncnorm.convert(model)
    probe = NormProbe(model)
    metrics, others = [kind(model) for kind in METRICS], [kind(model, sync_on_compute=False) for kind in METRICS]
    with probe:
        model(x.requires_grad_()).square().sum().backward()
    for metric in metrics + others:
        metric.update(probe.reading)
    found: dict[str, Any] = {}
    for metric in metrics:
        found |= {key: float(value) for key, value in metric.compute().items()}
    with count_collectives() as counts:
        meet(others, resolve(GroupSpec()))
    met = {key: float(value) for metric in others for key, value in metric.compute().items()}
    assert met == pytest.approx(found, nan_ok=True, rel=1e-12), "one gather gives what torchmetrics' own give"
    assert sum(counts.values()) == 2  # that all are here, and the rows of all metrics
    return {**found, "running": [model[0].running_mean.numpy(), model[0].running_var.numpy()]}


def cases_on_ranks() -> list[tuple[list[Tensor], bool]]:
    return [(parts, synchronised) for parts in (data(2, 5), data(0, 4)) for synchronised in (False, True)]


def all_on_ranks() -> list[dict[str, Any]]:
    return [on_ranks(*case) for case in cases_on_ranks()]


def assert_merged_exactly(outcomes: list[list[dict[str, Any]]]) -> None:
    """Of what :func:`all_on_ranks` gave on two ranks. Run by test_lightning_ranks.py, whose ranks have torchmetrics loaded."""
    for (parts, synchronised), *ranks in zip(cases_on_ranks(), *outcomes, strict=True):
        running = [found.pop("running") for found in ranks]
        assert ranks[1] == pytest.approx(ranks[0], nan_ok=True, rel=1e-12)
        found, total = ranks[0], sum(map(len, parts)) * 6
        alone = not len(parts[0])
        assert found["noise"] == pytest.approx(np.nan if alone else noise_of(parts), rel=1e-12, nan_ok=True)
        assert found["gap"] == pytest.approx(gap_of(parts, np.zeros(C), np.ones(C), 1e-5).mean(), rel=1e-10)
        exact = drift_of(*(np.stack(side) for side in zip(*running, strict=True)), 1e-5)
        assert found["drift"] == pytest.approx(exact.mean(), rel=1e-12)
        assert (found["drift_max"] == 0) == synchronised
        assert found["batch"] == (total if synchronised or alone else total / 2)
        # A forward and a backward row of 256 words, as long as C is small; see agreement.
        assert (found["exchanges"], found["exchange_kb"]) == ((2, 2 * 8 * 256 / 1e3) if synchronised else (0, 0))
        assert (found["exchange_ms"] > 0) == synchronised
