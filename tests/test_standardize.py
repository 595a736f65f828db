"""Tier: gloo ranks. Standardize and MinMaxScale against scikit-learn's scalers on the concatenated data of all ranks."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import syncnorm
from syncnorm import MinMaxScale, Standardize
from syncnorm.functional import min_max_scale, standardize
from syncnorm.testing import count_collectives, run_ranks


def wine() -> np.ndarray:
    """178 real samples of 13 features, and one that is constant."""
    from sklearn.datasets import load_wine

    x = load_wine().data
    return np.concatenate([x, np.full((len(x), 1), 0.1)], axis=1)


def theirs(name: str, **options: object) -> object:
    """scikit-learn is loaded here and not above: ranks load this file, too, and need it not."""
    from sklearn import preprocessing

    return getattr(preprocessing, name)(**options)


PAIRS = {
    "standardize": (lambda: Standardize(14), lambda: theirs("StandardScaler")),
    "no mean": (lambda: Standardize(14, with_mean=False), lambda: theirs("StandardScaler", with_mean=False)),
    "no std": (lambda: Standardize(14, with_std=False), lambda: theirs("StandardScaler", with_std=False)),
    "minmax": (lambda: MinMaxScale(14), lambda: theirs("MinMaxScaler")),
    "range": (lambda: MinMaxScale(14, -3.0, 2.0), lambda: theirs("MinMaxScaler", feature_range=(-3, 2))),
    "clip": (lambda: MinMaxScale(14, clip=True), lambda: theirs("MinMaxScaler", clip=True)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_scikit_learn_on_uneven_batches(name: str) -> None:
    make, reference = PAIRS[name]
    x = wine()
    scaler = reference().fit(x)
    ours = make().fit([torch.tensor(part) for part in np.split(x, [0, 1, 4, 100])])
    assert ours.count == 178 and ours.is_fitted
    new = np.random.default_rng(0).permutation(x) * 1.3 - 0.2  # outside of what was fitted, too
    np.testing.assert_allclose(ours(torch.tensor(new)), scaler.transform(new), rtol=1e-11, atol=1e-11)
    y = scaler.transform(x)
    np.testing.assert_allclose(ours.inverse(torch.tensor(y)), scaler.inverse_transform(y), rtol=1e-11, atol=1e-11)


def _fit(name: str, x: np.ndarray, splits: list[int]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    rank = dist.get_rank()
    start = sum(splits[:rank])
    mine = torch.tensor(x[start : start + splits[rank]])
    loader = DataLoader(TensorDataset(mine, torch.arange(len(mine))), batch_size=7)  # tuples, and unequally many
    ours = PAIRS[name][0]()
    with count_collectives() as counts:
        ours.fit(loader)
        ours(mine)
    return {key: value.numpy() for key, value in ours.state_dict().items()}, counts


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[100, 78], [178, 0], [1, 0, 177]], ids=str)
@pytest.mark.parametrize("name", ["standardize", "minmax"])
def test_ranks_equal_scikit_learn_on_everything_in_one_exchange(name: str, splits: list[int]) -> None:
    x = wine()
    scaler = PAIRS[name][1]().fit(x)
    if name == "standardize":
        expected = {"mean": scaler.mean_, "var": scaler.var_}
        expected["var"][-1] = 0  # scikit-learn keeps the rounding of its mean, and catches it later
    else:
        expected = {"minimum": scaler.data_min_, "maximum": scaler.data_max_}
    results = run_ranks(_fit, len(splits), name, x, splits)
    for state, counts in results:
        assert counts == {"all_reduce": 1}
        assert state["count"] == 178
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=1e-12, atol=0)
            assert state[key].tobytes() == results[0][0][key].tobytes()


def _timestamps() -> float:
    rng = np.random.default_rng(dist.get_rank())
    return float(Standardize(1).fit(torch.tensor(1.7e9 + rng.normal(size=(500, 1)))).var)


@pytest.mark.gloo
def test_large_means_keep_their_spread_over_ranks() -> None:
    both = np.concatenate([1.7e9 + np.random.default_rng(rank).normal(size=500) for rank in range(2)]) - 1.7e9
    # Sums of squares would be off by 1e-16·(1.7e9)² = 300; here by the rounding of one mean, 1.7e9·1e-16.
    assert run_ranks(_timestamps, 2) == pytest.approx([both.var()] * 2, rel=1e-6)


def test_constant_features_are_centred_and_come_back() -> None:
    x = torch.full((1000, 2), 0.1)
    for ours, expected in ((Standardize(2), 0.0), (MinMaxScale(2, 1.0, 4.0), 1.0)):
        ours.fit(x.split(7))
        assert torch.equal(ours(x), torch.full_like(x, expected))
        assert torch.equal(ours.inverse(ours(x)), x)
        assert ours(x + 1).isfinite().all()


@pytest.mark.parametrize("make", [lambda: Standardize((2, 3)), lambda: MinMaxScale((2, 3))], ids=["std", "minmax"])
def test_state_copies_casts_and_refit(make) -> None:
    x = torch.randn(50, 2, 3)
    ours = make().fit(x)
    expected = ours(x)
    loaded = make()
    loaded.load_state_dict(ours.state_dict())
    for twin in (loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).half()):
        assert torch.equal(twin(x), expected) and twin.is_fitted
    assert ours.half().double()(x.bfloat16()).dtype == torch.bfloat16
    assert ours(torch.ones(4, 2, 3, dtype=torch.int32)).dtype == torch.float32
    assert ours(x[:0]).shape == (0, 2, 3)
    assert torch.equal(ours.fit(x).state_dict()["count"], loaded.count), "a second fit replaces the first"
    empty = make()
    empty.load_state_dict(make().state_dict())
    assert not empty.is_fitted and "not fitted" in repr(empty)


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 3)
    model = torch.nn.Sequential(Standardize(3).fit(x), torch.nn.Linear(3, 2), MinMaxScale(2).fit(torch.randn(9, 2)))
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), expected)


def test_gradients_are_those_of_a_straight_line() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for ours in (Standardize(3).fit(x), MinMaxScale(3, -1, 1).fit(x)):
        assert torch.autograd.gradcheck(ours, x)
        assert torch.autograd.gradcheck(ours.inverse, x)


def test_functions_take_statistics_as_given() -> None:
    x = torch.tensor([[1.0, 5.0]])
    low, high = torch.tensor([0.0, 4.0]).double(), torch.tensor([2.0, 8.0]).double()
    assert torch.equal(min_max_scale(x, low, high), torch.tensor([[0.5, 0.25]]))
    assert torch.equal(standardize(x, low, high, clip=0.3), torch.tensor([[0.3, 0.125]]))


def test_errors_say_what_to_do_and_change_nothing() -> None:
    ours = Standardize(3)
    with pytest.raises(syncnorm.SyncNormError, match=r"Standardize has no statistics yet. Call fit\(batches\)"):
        ours(torch.ones(3))
    ours.fit(torch.randn(9, 3))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="Standardize: fit needs at least one sample on some rank, got none"):
        ours.fit([torch.empty(0, 3)])
    with pytest.raises(ValueError, match="at least one sample"):
        ours.fit([])
    with pytest.raises(ValueError, match=r"NaN or infinite .* in features \[2\]"):
        ours.fit(torch.tensor([[1.0, 2.0, float("inf")], [1.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"expected an input \[\*, 3\], .* got \[2, 4\]"):
        ours.fit([torch.ones(2, 4)])
    with pytest.raises(TypeError, match=r"got dict. Choose the tensor: fit\(batch\[\"x\"\] for batch in loader\)"):
        ours.fit([{"x": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match="low must be below high, got low=1, high=1"):
        MinMaxScale(3, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def _broken_loader() -> str:
    def batches():
        yield torch.ones(2, 3)
        if dist.get_rank() == 0:
            raise OSError("disk gone")

    ours = Standardize(3)
    try:
        ours.fit(batches())
    except (OSError, syncnorm.SyncNormMismatch) as error:
        assert not ours.is_fitted
        return str(error)
    return "no error"


@pytest.mark.gloo
def test_a_rank_whose_loader_breaks_lets_nobody_wait() -> None:
    first, second = run_ranks(_broken_loader, 2)
    assert first == "disk gone"
    assert second.startswith("1 of 2 ranks refused their input")


def _everybody_empty() -> None:
    with pytest.raises(ValueError, match="at least one sample on some rank"):
        MinMaxScale(2).fit([])


@pytest.mark.gloo
def test_empty_on_all_ranks_is_refused_on_all() -> None:
    run_ranks(_everybody_empty, 2)
