"""Tier: gloo ranks. Precise batch norm against numpy on the data of all ranks, where layers synchronise and where not."""

import copy
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import syncnorm
from syncnorm import recalibrate
from syncnorm.modules import (
    BatchNormLSTM,
    BatchRenorm1d,
    EvoNormB0,
    FrozenBatchNorm1d,
    GhostBatchNorm1d,
    MovingAverageBatchNorm1d,
    SwitchableNorm1d,
)
from syncnorm.testing import count_collectives, run_ranks
from tests.test_adapt_batch_norm import net, target


def by_hand(model: nn.Sequential, steps: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Pooled float64 statistics of both norms, the batch of every step normalised by itself."""
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    first = [step.numpy() @ w["0.weight"].T + w["0.bias"] for step in steps if len(step)]
    eps = model[1].eps
    hidden = [np.maximum((z - z.mean(0)) / np.sqrt(z.var(0) + eps) * w["1.weight"] + w["1.bias"], 0) for z in first]
    second = [h @ w["4.weight"].T + w["4.bias"] for h in hidden]
    out = {}
    for name, parts in (("1", first), ("5", second)):
        values = np.concatenate(parts)
        out |= {f"{name}.running_mean": values.mean(0), f"{name}.running_var": values.var(0, ddof=1)}
    return out


def assert_recalibrated(state, before, expected: dict[str, np.ndarray]) -> None:
    for name, value in state.items():
        if name in expected:
            np.testing.assert_allclose(value, expected[name], rtol=1e-10, atol=1e-10)
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


def marks(model: nn.Module) -> list:
    """Everything but values that a caller could find changed."""
    return [
        (m.training, getattr(m, "momentum", None), sorted(m.__dict__), list(m._forward_pre_hooks), [id(b) for b in m.buffers()])
        for m in model.modules()
    ]  # fmt: skip


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d,
        nn.SyncBatchNorm,
        syncnorm.SyncBatchNorm1d,
        BatchRenorm1d,
        lambda n: GhostBatchNorm1d(n, virtual_batch_size=2),
        lambda n: nn.BatchNorm1d(n, momentum=None),
    ],
    ids=["torch", "torch sync", "ours", "renorm", "ghost", "cumulative"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_are_the_pooled_ones(norm, training: bool) -> None:
    model, batches = net(norm).train(training), target(6, 3, 0, 20, 50)
    for x in target(9, 9, seed=3):
        model(x)  # an active batch renorm has statistics to be pulled towards
    before, marked = copy.deepcopy(model.state_dict()), marks(model)
    assert recalibrate(model, [(x, "label") for x in batches], num_batches=4) == 29
    assert_recalibrated(model.state_dict(), before, by_hand(model, batches[:4]))
    assert marks(model) == marked


@dataclass
class Sample:
    x: torch.Tensor


@pytest.mark.parametrize("kind", [Sample, lambda x: SimpleNamespace(x=x)], ids=["dataclass", "object"])
def test_batches_that_are_objects(kind) -> None:
    model, batches = net(), target(20, 50)
    before = copy.deepcopy(model.state_dict())
    num_samples = recalibrate(model, [kind(x) for x in batches], forward=lambda m, batch: m(batch.x))
    assert num_samples == (70 if kind is Sample else 0), "of an object of its own nobody knows the size"
    assert_recalibrated(model.state_dict(), before, by_hand(model, batches))


@pytest.mark.parametrize("wrap", ["averaged", "compiled", "averaged in eval"])
def test_averaged_copies_and_compiled_models(wrap: str) -> None:
    model, batches = net(), target(8, 12)
    inner = model.eval() if wrap == "averaged in eval" else model
    wrapped = torch.compile(inner, backend="eager") if wrap == "compiled" else AveragedModel(inner)
    inside = model if wrap == "compiled" else wrapped.module
    before, outside = copy.deepcopy(inside.state_dict()), copy.deepcopy(model.state_dict())
    assert recalibrate(wrapped, batches) == 20
    assert_recalibrated(inside.state_dict(), before, by_hand(model, batches))
    if wrap != "compiled":
        assert all(torch.equal(value, outside[name]) for name, value in model.state_dict().items())


def test_what_the_owner_fixed_is_left() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.evaluated, self.untracked, self.free = (
                FrozenBatchNorm1d(4), nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            )  # fmt: skip
            self.untracked.track_running_stats = False  # as Lightning's BaseFinetuning freezes
            self.double()

        def forward(self, x):
            return self.frozen(x), self.evaluated(x), self.untracked(x), self.free(x), self.free(3 * x)

    model, (x, y) = Three(), target(5, 9)
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, [x, y])
    both = torch.cat([x, 3 * x, y, 3 * y]).numpy()
    np.testing.assert_allclose(model.free.running_mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(model.free.running_var, both.var(0, ddof=1), rtol=1e-12)
    for name, value in model.state_dict().items():
        assert name.startswith("free.running") or torch.equal(value, before[name]), name


def test_masks_weigh_and_large_means_keep_their_variance() -> None:
    model, x = syncnorm.SyncBatchNorm1d(3), torch.randn(40, 3, 7)
    x[:, 1] += 1e4
    mask = torch.rand(40, 1, 7) < 0.3
    recalibrate(model, [(x[:9], mask[:9]), (x[9:], mask[9:])], forward=lambda m, batch: m(batch[0], mask=batch[1]))
    values = x.double().transpose(1, 2)[mask[:, 0]].numpy()
    np.testing.assert_allclose(model.running_mean, values.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model.running_var, values.var(0, ddof=1), rtol=1e-6)


def test_norms_with_batch_statistics_among_others() -> None:
    x = torch.randn(30, 4, 5, dtype=torch.float64) * 3 + 2
    switchable = SwitchableNorm1d(4).double()
    evo = EvoNormB0(4).double()
    for model in (switchable, evo):
        recalibrate(model, [x[:7], x[7:], x[:3]], num_batches=2)
        np.testing.assert_allclose(model.running_var, x.numpy().var((0, 2), ddof=1), rtol=1e-12)
    np.testing.assert_allclose(switchable.running_mean, x.numpy().mean((0, 2)), rtol=1e-12)


def test_moving_averages_measure_the_second_moment_one_sample_at_a_time() -> None:
    model = nn.Sequential(MovingAverageBatchNorm1d(4, affine=False), MovingAverageBatchNorm1d(4)).double()
    x = target(50)[0]
    recalibrate(model, x.split(1))
    seen = np.cumsum(x.numpy() ** 2, 0) / np.arange(1, 51)[:, None]
    np.testing.assert_allclose(model[0].running_var, (x.numpy() ** 2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(model[1].running_var, (x.numpy() ** 2 / (seen + 1e-5)).mean(0), rtol=1e-12)
    assert not model[0].running_mean.any()


def test_random_numbers_are_those_of_a_run_without_it() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, i: int):
            return super().__getitem__(i)[0] + random.random() + float(np.random.rand())

    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Noisy(target(12)[0]), batch_size=4, shuffle=True, generator=generator)

    def draws() -> tuple:
        return torch.rand(1).item(), random.random(), np.random.rand(), torch.rand(1, generator=generator).item()

    states = torch.get_rng_state(), random.getstate(), np.random.get_state(), generator.get_state()
    expected, model = draws(), net()
    for restore, state in zip(
        (torch.set_rng_state, random.setstate, np.random.set_state, generator.set_state), states, strict=True
    ):
        restore(state)
    recalibrate(model, loader, forward=lambda m, batch: m(batch + torch.rand(1)))
    assert draws() == expected


def test_refusals_leave_the_model_as_it_was() -> None:
    model, (x, y) = net(), target(6, 6)
    before, marked = copy.deepcopy(model.state_dict()), marks(model)

    def stream(n: int):
        yield from [x] * n

    def fails(m: nn.Module, batch: torch.Tensor) -> None:
        m(batch)
        raise RuntimeError("out of memory")

    with pytest.raises(ValueError, match="recalibrate needs at least one sample on some rank, got none"):
        recalibrate(model, [])
    with pytest.raises(ValueError, match="asked for num_batches=3, and there are 2 on this rank"):
        recalibrate(model, [x, y], 3, forward=fails)  # before the first forward, as the length is known
    with pytest.raises(ValueError, match="asked for num_batches=3, and there are 2 on this rank"):
        recalibrate(model, stream(2), 3)
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="num_batches is a number of batches, at least 1, or None for all; got"):
            recalibrate(model, [x], wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        recalibrate(model, [x], forward=fails)
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) got one value per channel, \[1, 5\]"):
        recalibrate(model, [x, x[:1]])
    with pytest.raises(ValueError, match="the inputs of 1 hold NaN or infinite values"):
        recalibrate(model, [x, x * float("inf")])
    with pytest.raises(TypeError, match="expected batches that are tensors or tuples that begin with one, got dict"):
        recalibrate(model, [{"x": x}])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert marks(model) == marked


def test_models_without_anything_to_measure() -> None:
    for model, left in (
        (nn.Linear(2, 2), "and it has none"),
        (net(FrozenBatchNorm1d), r"and all it has are left as they are: \['1', '5'\]"),
        (BatchNormLSTM(4, 3, max_length=5), r"and all it has are left as they are: \[''\]"),
    ):
        with pytest.raises(
            ValueError, match=f"needs a model with batch norms whose running statistics may move, {left}"
        ):
            recalibrate(model, target(6))
    mixed = nn.Sequential(nn.BatchNorm1d(4), BatchNormLSTM(4, 3, max_length=5))
    with pytest.warns(UserWarning, match=r"leaves \['1'\]: the statistics of BatchNormLSTM are per time step"):
        recalibrate(mixed, target(6), forward=lambda m, batch: m[0](batch.float()))


def _digits_errors(seed: int) -> tuple[float, float]:
    """Error on held-out digits after 50 steps with momentum 0.001, and after recalibration."""
    from syncnorm.lightning import DigitsDataModule, DigitsMLP  # here, as every rank of the others imports this file

    torch.manual_seed(seed)
    data, model = DigitsDataModule(batch_size=32), DigitsMLP().net
    data.setup()
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 0.001
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for images, labels in [batch for _ in range(2) for batch in data.train_dataloader()][:50]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def error() -> float:
        images, labels = data._held_out.tensors
        return float((model.eval()(images).argmax(1) != labels).float().mean())

    lagging = error()
    recalibrate(model, data.train_dataloader(), num_batches=31)
    return lagging, error()


def test_a_lagging_average_on_digits() -> None:
    """The claim: running statistics of momentum 0.001 are useless after 50 steps, though the weights are not."""
    lagging, precise = zip(*map(_digits_errors, range(3)), strict=True)
    assert min(lagging) > 0.20, lagging  # 24, 57 and 61 % were measured, and 10.5, 6.3 and 4.5 % after
    assert max(precise) < 0.12, precise


KINDS = ("plain", "ours", "torch sync", "ghosts", "ours under ddp")


def _over_ranks(sizes: list[list[int]]) -> dict[str, dict[str, bytes]]:
    rank, out = dist.get_rank(), {}
    for kind in KINDS:
        model = net(nn.SyncBatchNorm if kind == "torch sync" else nn.BatchNorm1d)
        if kind in ("ours", "ghosts", "ours under ddp"):
            syncnorm.convert(model, **({"to": "ghost_batch_norm", "virtual_batch_size": 2} if kind == "ghosts" else {}))
        wrapped = nn.parallel.DistributedDataParallel(model) if kind == "ours under ddp" else model
        with count_collectives() as counts:
            assert recalibrate(wrapped, iter(target(*sizes[rank], seed=rank))) == sum(map(sum, sizes))
        if kind == "plain":
            assert counts == {"all_reduce": 1}
        state = model.state_dict().items()
        out[kind] = {name: value.numpy().tobytes() for name, value in state if "running" in name}
    return out


@pytest.mark.gloo
@pytest.mark.parametrize("sizes", [[[6, 3, 4], [9]], [[2, 30, 4, 5], [7], [5, 0, 8]]], ids=str)
def test_uneven_ranks_equal_one_process_and_synchronised_layers_normalise_together(sizes: list[list[int]]) -> None:
    data = [target(*s, seed=rank) for rank, s in enumerate(sizes)]
    apart = [x for batches in data for x in batches]
    longest = max(map(len, data))
    together = [torch.cat([batches[i] for batches in data if i < len(batches)]) for i in range(longest)]
    results = run_ranks(_over_ranks, len(sizes), sizes)
    for kind in KINDS:
        expected = by_hand(net(), apart if kind == "plain" else together)
        for per_rank in results:
            assert per_rank[kind] == results[0][kind], "the same bits"
            for name, value in per_rank[kind].items():
                np.testing.assert_allclose(np.frombuffer(value), expected[name], rtol=1e-10, atol=1e-10, err_msg=kind)


def _failures() -> list[str]:
    rank, said = dist.get_rank(), []
    model, (x, y) = syncnorm.convert(net()), target(6, 4)
    plain = net()
    pair = dist.new_group([0, 1])
    before = copy.deepcopy(model.state_dict())

    def breaks():
        yield x
        raise OSError("disk gone")

    def fails_late(m: nn.Module, batch: torch.Tensor) -> None:
        m(batch)
        raise RuntimeError("out of memory")

    def fails_between(m: nn.Module, batch: torch.Tensor) -> None:
        hidden = m[:3](batch)
        if batch is y:
            raise RuntimeError("out of memory")
        m[3:](hidden)

    calls = [
        (model, [x] if rank else [], {}),  # a rank without data, where layers synchronise
        (model, breaks() if rank else [x, y], {}),
        (model, [y[:, :1] if rank else y], {}),  # before the first exchange of the first batch
        (model, [x, y], {"forward": fails_late if rank else None}),  # after the last one
        (model, [x, y], {"forward": fails_between if rank else None}),
        (model, [x] if rank else [x, y], {"num_batches": 2}),
        (plain, [x] if rank else [x, y], {"num_batches": 2}),
        (nn.Linear(2, 2) if rank else plain, [x], {}),
        (model, [x], {"process_group": 1}),
        (syncnorm.convert(net(), process_group=pair), [x[:1], y] if rank else [x[:0], y], {}),
    ]
    for called, batches, options in calls:
        with pytest.raises(Exception, match="") as caught:  # which one is for the parent to say
            recalibrate(called, batches, **options)
        said.append(f"{caught.typename}: {caught.value}")
    for state in (model.state_dict(), plain.state_dict()):
        for name, value in state.items():
            assert torch.equal(value, before[name]), name
    return said


@pytest.mark.gloo
def test_a_rank_that_fails_lets_nobody_wait() -> None:
    first, second = run_ranks(_failures, 2)
    expected = [
        ("needs a batch on every rank, as layers normalise over ranks, and ranks [0] have none",) * 2,
        ("1 of 2 ranks refused their input", "OSError: disk gone"),
        ("1 of 2 ranks refused their input to this call", "mat1 and mat2 shapes cannot be multiplied"),
        ("1 of 2 ranks refused their input", "RuntimeError: out of memory"),
        ("1 of 2 ranks refused their input to this call", "RuntimeError: out of memory"),
        ("1 of 2 ranks refused their input", "num_batches=2, and there are 1 on this rank"),
        ("1 of 2 ranks refused their input", "num_batches=2, and there are 1 on this rank"),
        ("1 of 2 ranks refused their input", "and it has none"),
        ("needs all ranks that 1 normalises with, [0, 1], and its process_group has [0]", "process_group has [1]"),
        ("got one value per channel",) * 2,
    ]
    for said, wanted in zip(zip(first, second, strict=True), expected, strict=True):
        assert all(part in text for part, text in zip(wanted, said, strict=True)), said
