"""Tier: gloo ranks. RunningNorm against numpy's moments of everything seen, over ranks and workers, frozen, copied, stored."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist

import syncnorm
from syncnorm import RunningNorm
from syncnorm.core.features import add_moments, feature_moments
from syncnorm.core.moments import Moments
from syncnorm.functional import running_norm
from syncnorm.testing import RankError, count_collectives, run_ranks


def observations(*sizes: int, features: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Batches that drift, with features of very different scale."""
    rng = np.random.default_rng(seed)
    scale, offset = np.geomspace(1e-3, 1e3, features), np.linspace(-5, 1e4, features)
    return [rng.normal(size=(n, features)) * scale + offset + step for step, n in enumerate(sizes)]


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_moments_are_those_of_everything_seen_from_the_first_sample_on() -> None:
    norm, seen = RunningNorm(3, clip=None), np.zeros((0, 3))
    for batch in observations(1, 1, 0, 7, 199, 1):
        y = norm(torch.tensor(batch))
        seen = np.concatenate([seen, batch])
        assert norm.count == len(seen)
        close(norm.mean, seen.mean(0))
        var = seen.var(0) if len(seen) > 1 else np.ones(3)
        # mean/std is up to 3e3 here, and centring costs its square in units of 1e-16
        close(norm.var, var, 1e-9)
        np.testing.assert_allclose(y, (batch - seen.mean(0)) / np.sqrt(var + 1e-8), rtol=1e-9, atol=1e-7)


def test_first_sample_is_zero_and_two_equal_ones_do_not_divide_by_zero() -> None:
    norm = RunningNorm(2)
    first = torch.tensor([3.0, -1.0])
    assert torch.equal(norm(first), torch.zeros(2))
    assert torch.equal(norm(first), torch.zeros(2))
    assert norm.var.eq(0).all()
    assert torch.equal(norm.normalize(first + 1), torch.full((2,), 10.0))  # a change after a constant, clipped


def test_before_any_sample_it_is_the_identity_up_to_eps() -> None:
    x = torch.randn(4, 3)
    torch.testing.assert_close(RunningNorm(3).eval()(x), x)
    assert RunningNorm(3)(x[:0]).shape == (0, 3)


def test_an_empty_update_changes_no_bit() -> None:
    norm = RunningNorm(3)
    norm.update(torch.tensor(observations(7)[0]))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.update(torch.empty(0, 3))
    norm.update(torch.empty(4, 0, 3))
    norm.merge()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_long_stream_of_single_samples_loses_no_digits() -> None:
    data = np.random.default_rng(1).normal(loc=1e6, size=(2000, 1))
    norm = RunningNorm(1)
    for row in data:
        norm.update(torch.tensor(row))
    # exact values by shifting; one rounding of the mean per update, 1e6·1e-16·sqrt(2000)
    assert abs(float(norm.mean[0] - 1e6) - (data - 1e6).mean()) < 1e-8
    assert abs(float(norm.var[0]) / (data - 1e6).var() - 1) < 1e-8


def test_shapes_of_images_and_integers() -> None:
    norm = RunningNorm((4, 4, 3), clip=5.0)
    x = torch.randint(0, 256, (2, 6, 4, 4, 3), dtype=torch.uint8)
    y = norm(x)
    assert y.dtype == torch.float32 and y.shape == x.shape
    flat = x.numpy().reshape(-1, 4, 4, 3).astype(float)
    close(norm.mean, flat.mean(0))
    expected = np.clip((flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-8), -5, 5)
    np.testing.assert_allclose(y.numpy().reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)


def test_denormalize_inverts_and_gradients_flow_with_the_moments_as_constants() -> None:
    norm = RunningNorm(3, clip=None)
    norm.update(torch.tensor(observations(50)[0]))
    norm.eval()
    x = torch.tensor(observations(5, seed=3)[0], requires_grad=True)
    torch.testing.assert_close(norm.denormalize(norm(x)), x, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(norm(x).sum(), x)
    torch.testing.assert_close(gradient, (1 / norm.std).expand_as(x))
    assert torch.autograd.gradcheck(lambda t: norm(t * 1.0), x, atol=1e-4, rtol=1e-4)


def test_frozen_and_evaluation_leave_the_moments_and_normalise() -> None:
    norm = RunningNorm(3)
    batch = torch.tensor(observations(9)[0])
    norm(batch)
    before, expected = norm.moments, norm.normalize(batch)
    assert torch.equal(norm.freeze()(batch), expected)
    assert torch.equal(norm.unfreeze().eval()(batch), expected)
    with syncnorm.no_stats_update(norm.train()):
        assert torch.equal(norm(batch), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, norm.moments, strict=True))
    with pytest.raises(syncnorm.SyncNormError, match=r"RunningNorm is frozen, .* Call unfreeze\(\) first"):
        norm.freeze().update(batch)
    with pytest.raises(syncnorm.SyncNormError, match="frozen"):
        norm.merge(RunningNorm(3))
    assert "frozen" in repr(norm)
    assert norm.unfreeze().reset().count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_moments_stay_float64_and_outputs_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    norm = RunningNorm(3).to(dtype)
    x = torch.randn(20, 3).to(dtype)
    y = norm(x)
    assert y.dtype == dtype and all(b.dtype == torch.float64 for b in norm.buffers())
    exact = x.double().numpy()
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-8)
    assert np.abs(y.double().numpy() - exact).max() <= torch.finfo(dtype).eps * 4 + 1e-12


def test_state_and_copies() -> None:
    norm = RunningNorm(3)
    norm.update(torch.tensor(observations(9)[0]))
    assert set(norm.state_dict()) == {"count", "mean", "m2"}
    loaded = RunningNorm(3)
    loaded.load_state_dict(norm.state_dict())
    more = torch.tensor(observations(4, seed=5)[0])
    expected = copy.deepcopy(norm)(more)
    for twin in (loaded, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(more), expected)


def _collect(sizes: list[int]) -> RunningNorm:
    norm = RunningNorm(3)
    with syncnorm.disabled(norm):  # a process of its own, as a worker is
        for row in observations(*sizes)[1 + dist.get_rank()]:
            norm(torch.tensor(row))
    return norm


@pytest.mark.gloo
def test_workers_are_merged() -> None:
    sizes = [5, 40, 1]
    everything = np.concatenate(observations(*sizes))
    norm = RunningNorm(3)
    norm.update(torch.tensor(observations(*sizes)[0]))
    worker, other = run_ranks(_collect, 2, sizes)
    norm.merge(worker, other.moments)
    assert norm.count == 46
    close(norm.mean, everything.mean(0))
    close(norm.var, everything.var(0), 1e-9)


def _over_ranks(sizes: list[list[int]]) -> tuple[int, dict[str, bytes], list[np.ndarray]]:
    rank = dist.get_rank()
    norm, outputs = RunningNorm(3, clip=None), []
    with count_collectives() as counts:
        for step, step_sizes in enumerate(sizes):
            batches = observations(*step_sizes, seed=step)
            outputs.append(norm(torch.tensor(batches[rank])).numpy())
        norm.eval()(torch.ones(3))
        norm.train().freeze()(torch.ones(3))
        norm.unfreeze().merge(*[_collect_local(observations(4, seed=90 + rank)[0])] * (rank != 1))
    state = {name: value.numpy().tobytes() for name, value in norm.state_dict().items()}
    return counts["all_reduce"], state, outputs


def _collect_local(data: np.ndarray) -> Moments:
    return feature_moments(torch.tensor(data))


@pytest.mark.gloo
@pytest.mark.parametrize("sizes", [[[4, 4], [1, 0]], [[5, 0, 1], [0, 0, 0], [2, 199, 3]]], ids=str)
def test_ranks_equal_one_process_in_one_exchange_per_update(sizes: list[list[int]]) -> None:
    ranks = len(sizes[0])
    results = run_ranks(_over_ranks, ranks, sizes)
    seen = np.zeros((0, 3))
    for step, step_sizes in enumerate(sizes):
        batches = observations(*step_sizes, seed=step)
        seen = np.concatenate([seen, *batches])
        for rank, (_, _, outputs) in enumerate(results):
            expected = (batches[rank] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
            np.testing.assert_allclose(outputs[step], expected, rtol=1e-9, atol=1e-8)
    merged = [observations(4, seed=90 + rank)[0] for rank in range(ranks) if rank != 1]
    seen = np.concatenate([seen, *merged])
    for count, state, _ in results:
        assert count == len(sizes) + 1
        assert state == results[0][1]
    state = {name: np.frombuffer(value) for name, value in results[0][1].items()}
    np.testing.assert_allclose(state["mean"], seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(state["m2"], seen.var(0) * len(seen), rtol=1e-9)
    assert state["count"] == len(seen)


def _one_rank_refuses() -> str:
    norm = RunningNorm(3)
    try:
        norm(torch.zeros(2, 4 if dist.get_rank() == 1 else 3))
    except (ValueError, syncnorm.SyncNormError) as error:
        assert norm.count == 0
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.gloo
def test_a_rank_that_refuses_its_input_lets_nobody_wait() -> None:
    first, second, third = run_ranks(_one_rank_refuses, 3)
    assert first == third
    assert first.startswith("SyncNormMismatch: RunningNorm: 1 of 3 ranks refused their input")
    assert second.startswith("ValueError: RunningNorm: expected an input [*, 3], with the features last, got [2, 4]")


def _group_goes() -> None:
    norm = RunningNorm(1)
    norm(torch.ones(2, 1))
    with syncnorm.disabled(norm), count_collectives() as counts:
        norm(torch.ones(2, 1))
    assert not counts and norm.process_group == "world"
    dist.destroy_process_group()
    copied = copy.deepcopy(norm)
    copied(torch.ones(2, 1))  # a copy may be a worker's
    norm(torch.ones(2, 1))


@pytest.mark.gloo
def test_a_group_that_is_gone_is_an_error() -> None:
    with pytest.raises(RankError, match="RunningNorm met 2 ranks before and now there is no process group"):
        run_ranks(_group_goes, 2)


def test_compiled_training_equals_eager() -> None:
    torch._dynamo.reset()
    norm = RunningNorm(3)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    for batch in observations(4, 4, 9):
        x = torch.tensor(batch)
        torch.testing.assert_close(compiled(x), norm(x), rtol=1e-12, atol=1e-12)


def _compiled_over_ranks() -> float:
    norm = RunningNorm(3)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    x = torch.tensor(observations(4, 4)[dist.get_rank()])
    return float((compiled(x) - norm(x)).abs().max())


@pytest.mark.gloo
def test_compiled_over_ranks_equals_eager() -> None:
    assert max(run_ranks(_compiled_over_ranks, 2)) < 1e-12


def test_function_updates_in_place() -> None:
    count, mean, m2 = torch.zeros(1, dtype=torch.float64), *torch.zeros(2, 3, dtype=torch.float64)
    x = torch.tensor(observations(6)[0])
    norm = RunningNorm(3)
    assert torch.equal(running_norm(x, count, mean, m2, True), norm(x))
    assert torch.equal(m2, norm.m2)


def test_constant_columns_have_a_variance_of_exactly_zero() -> None:
    parts = [feature_moments(torch.full((n, 1), 0.1, dtype=torch.float64)) for n in (1, 3, 199)]
    merged = add_moments(add_moments(parts[0], parts[1]), parts[2])
    assert merged.m2 == 0 and merged.mean == 0.1


def test_what_is_not_finite_is_refused_and_changes_nothing() -> None:
    norm = RunningNorm(3)
    norm(torch.ones(2, 3))
    before = norm.moments
    with pytest.raises(ValueError, match=r"NaN or infinite .* in features \[1\]"):
        norm(torch.tensor([[0.0, float("nan"), 1.0]]))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.moments, strict=True))


def test_bad_input_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RunningNorm: expected an input \[\*, 2, 3\], .* got \[3\]"):
        RunningNorm((2, 3))(torch.ones(3))
    with pytest.raises(TypeError, match=r"RunningNorm: expected real values, got torch\.complex64"):
        RunningNorm(3)(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"expected a number of features, .* got 0"):
        RunningNorm(0)
    with pytest.raises(ValueError, match="clip must be positive"):
        RunningNorm(3, clip=0.0)
    with pytest.raises(ValueError, match="eps must not be negative"):
        RunningNorm(3, eps=-1.0)
    with pytest.raises(ValueError, match="merge moments of its own shape only"):
        RunningNorm(3).merge(RunningNorm(4))
