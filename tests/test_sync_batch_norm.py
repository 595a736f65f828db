"""Tier: gloo ranks. One layer over 2, 3 and 4 ranks equals torch's on the whole batch, to the second derivative."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm.kernels import objections
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import LAYERS, errors, my_slice, randomise_affine, results, step_errors, torchs, whole_batch

OURS = {
    2: syncnorm.SyncBatchNorm1d,
    3: syncnorm.SyncBatchNorm1d,
    4: syncnorm.SyncBatchNorm2d,
    5: syncnorm.SyncBatchNorm3d,
}
SERVING = [name for name, reason in objections(torch.empty(2, 3, 4)).items() if reason is None]
SPLITS = [[4, 4], [7, 2], [5, 0, 3], [1, 1, 1, 1], [0, 8], [1, 0, 0, 7]]
SPATIAL = [(), (5,), (4, 5), (2, 3, 4)]

pytestmark = pytest.mark.gloo


def _every_shape(splits: list[int], backend: str) -> dict[str, float]:
    worst: dict[str, float] = {}
    for spatial in SPATIAL:
        for channels in (1, 3, 65):
            shape = (sum(splits), channels, *spatial)
            for layer in (OURS[len(shape)], syncnorm.SyncBatchNorm):
                mine = layer(channels, dtype=torch.float64, backend=backend)
                theirs = LAYERS[len(shape)](channels, dtype=torch.float64)
                for name, error in step_errors(mine, theirs, shape, splits).items():
                    key = f"{shape} {name}"
                    worst[key] = max(worst.get(key, 0.0), error)
    return worst


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("backend", SERVING)
def test_equals_the_whole_batch(splits: list[int], backend: str) -> None:
    for per_rank in run_ranks(_every_shape, len(splits), splits, backend):
        # Second derivatives of this loss grow to 1e4 times the inputs; errors are relative to the largest value.
        too_large = {name: error for name, error in per_rank.items() if error > 1e-12}
        assert not too_large


def _settings(splits: list[int]) -> dict[str, float]:
    worst: dict[str, float] = {}
    settings: list[dict[str, Any]] = [
        {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats": False},
        {"affine": False, "track_running_stats": False}, {"eps": 1e-3, "momentum": 0.3}, {"bias": False},
    ]  # fmt: skip
    for options in settings:
        mine = syncnorm.SyncBatchNorm2d(3, dtype=torch.float64, **options)
        theirs = torchs(nn.BatchNorm2d, 3, dtype=torch.float64, **options)
        for step in range(3):  # several: the cumulative average needs more than one
            for name, error in step_errors(mine, theirs, (sum(splits), 3, 2, 3 + step), splits).items():
                worst[f"{options} step {step} {name}"] = error
    return worst


@pytest.mark.parametrize("splits", [[3, 4], [2, 0, 3]], ids=str)
def test_every_setting_equals_the_whole_batch(splits: list[int]) -> None:
    for per_rank in run_ranks(_settings, len(splits), splits):
        assert not {name: error for name, error in per_rank.items() if error > 1e-12}


def _uneven_maps() -> dict[str, float]:
    # Ranks hold one image each, of different size: statistics must weigh pixels, not images.
    sizes = [(2, 3), (5, 7), (1, 1)]
    pieces = [
        torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, size in enumerate(sizes)
    ]
    whole = torch.cat([piece.flatten(2) for piece in pieces], 2)
    ends = torch.tensor([0] + [p[0, 0].numel() for p in pieces]).cumsum(0)
    rank = dist.get_rank()
    layer, oracle = syncnorm.SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    exact = results(oracle, whole, torch.ones_like(whole))
    mine = results(layer, pieces[rank], torch.ones_like(pieces[rank]))
    part = slice(int(ends[rank]), int(ends[rank + 1]))
    for name in ("y", "dx", "ddx"):
        exact[name], mine[name] = exact[name][..., part], mine[name].flatten(2)
    return errors(mine, exact, slice(None))


def test_uneven_maps_are_weighed_by_their_pixels() -> None:
    for per_rank in run_ranks(_uneven_maps, 3):
        assert max(per_rank.values()) <= 1e-12, per_rank


def _dtypes(splits: list[int]) -> list[str]:
    failures = []
    halves, floats = [torch.float16, torch.bfloat16], [torch.float16, torch.bfloat16, torch.float32]
    mixes = [(x, p, s) for x in floats for p in floats for s in (torch.float32, *halves)] + [(torch.float64,) * 3]
    for input_dtype, param_dtype, stat_dtype in mixes:
        for track in (True, False):
            layer = syncnorm.SyncBatchNorm2d(3, track_running_stats=track)
            randomise_affine(layer)
            layer.weight.data, layer.bias.data = layer.weight.data.to(param_dtype), layer.bias.data.to(param_dtype)
            if track:
                layer.running_mean, layer.running_var = (
                    layer.running_mean.to(stat_dtype),
                    layer.running_var.to(stat_dtype),
                )
            x, loss_weight = (t.to(input_dtype) for t in whole_batch((sum(splits), 3, 4, 4)))
            oracle = nn.BatchNorm2d(3, track_running_stats=track, dtype=torch.float64)
            oracle.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
            exact = results(oracle, x.double(), loss_weight.double(), second_order=False)
            part = my_slice(splits)
            mine = results(layer, x[part], loss_weight[part], second_order=False)
            assert mine["y"].dtype == mine["dx"].dtype == input_dtype and mine["sum:dweight"].dtype == param_dtype
            # The loss cubes y in the input's dtype: three roundings, and as many again on the way back.
            # float64 has no wider type to hold its statistics in.
            roundings = 8 if input_dtype == torch.float64 else 2
            bounds = {"y": roundings * torch.finfo(input_dtype).eps, "running": 2 * torch.finfo(stat_dtype).eps}
            rounding = max(torch.finfo(d).eps for d in (input_dtype, param_dtype))
            for name, error in errors(mine, exact, part).items():
                bound = next((b for prefix, b in bounds.items() if name.startswith(prefix)), 8 * rounding)
                if error > bound:
                    failures.append(
                        f"{input_dtype} {param_dtype} {stat_dtype} track={track} {name}: {error:.1e} > {bound:.1e}"
                    )
    return failures


@pytest.mark.parametrize("splits", [[5, 3], [6, 0, 2]], ids=str)
def test_every_mix_of_dtypes_runs_and_rounds_once(splits: list[int]) -> None:
    for failures in run_ranks(_dtypes, len(splits), splits):
        assert not failures, "\n".join(failures)


def _layouts(splits: list[int]) -> float:
    x, loss_weight = whole_batch((sum(splits), 3, 4, 5))
    part = my_slice(splits)
    exact = results(nn.BatchNorm2d(3, dtype=torch.float64), x, loss_weight)
    worst = 0.0
    laid = {
        "contiguous": x[part],
        "channels_last": x[part].contiguous(memory_format=torch.channels_last),
        "transposed": x[part].transpose(0, 3).contiguous().transpose(0, 3),
        "strided": torch.stack([x[part], x[part]], -1)[..., 0],
        "flipped": x[part].flip(2).flip(2),
    }
    for name, mine in laid.items():
        for weight in (loss_weight[part], loss_weight[part].contiguous(memory_format=torch.channels_last)):
            layer = syncnorm.SyncBatchNorm2d(3, dtype=torch.float64)
            y = layer(mine)
            if name in ("contiguous", "channels_last"):
                assert y.stride() == mine.stride(), name
            worst = max(
                worst,
                *errors(results(syncnorm.SyncBatchNorm2d(3, dtype=torch.float64), mine, weight), exact, part).values(),
            )
    return worst


def test_result_does_not_depend_on_layout() -> None:
    assert max(run_ranks(_layouts, 2, [3, 2])) <= 1e-12


def _every_shard_empty() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = syncnorm.SyncBatchNorm2d(3)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.empty(0, 3, 4, 4, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
        out[str(dtype)] = (
            tuple(y.shape),
            changed,
            tuple(x.grad.shape),
            layer.weight.grad.tolist(),
            layer.bias.grad.tolist(),
        )
    return out


def test_every_shard_empty_changes_nothing() -> None:
    expected = ((0, 3, 4, 4), [], (0, 3, 4, 4), [0.0] * 3, [0.0] * 3)
    for per_rank in run_ranks(_every_shard_empty, 2):
        assert all(value == expected for value in per_rank.values()), per_rank


def _collectives() -> dict[str, Any]:
    layer, out = syncnorm.SyncBatchNorm1d(4), {}
    x = torch.randn(3, 4, requires_grad=True)
    with count_collectives() as forward:
        y = layer(x)
    with count_collectives() as backward:
        y.sum().backward()
    with count_collectives() as evaluation:
        layer.eval()(x).sum().backward()
    untracked = syncnorm.SyncBatchNorm1d(4, track_running_stats=False).eval()
    with count_collectives() as local:
        out["local"] = float(untracked(torch.randn(3, 4) + dist.get_rank()).mean().abs())
    return out | {"forward": forward, "backward": backward, "eval": evaluation, "untracked eval": local}


def test_one_collective_forward_one_backward_none_in_eval() -> None:
    for per_rank in run_ranks(_collectives, 2):
        assert per_rank["forward"] == per_rank["backward"] == {"all_reduce": 1}
        assert per_rank["eval"] == per_rank["untracked eval"] == {}
        assert per_rank["local"] < 1e-6  # evaluation without running statistics is local, as torch's


def _bits(seed: int) -> list[bytes]:
    torch.manual_seed(seed + dist.get_rank())
    layer, out = syncnorm.SyncBatchNorm2d(37), []
    for step in range(5):
        x = torch.randn(2 + (dist.get_rank() + step) % 3, 37, 3, 3, requires_grad=True)
        layer(x).square().sum().backward()
        out.append(layer.running_mean.numpy().tobytes() + layer.running_var.numpy().tobytes())
    return [*out, x.grad.numpy().tobytes()]


def test_buffers_are_the_same_bits_on_all_ranks_and_in_every_run() -> None:
    first, second = (run_ranks(_bits, 3, 11) for _ in range(2))
    assert first == second
    assert first[0][:-1] == first[1][:-1] == first[2][:-1]


def _split_invariance(splits: list[int]) -> Any:
    x, _ = whole_batch((8, 5, 3, 3), dtype=torch.float32)
    layer = syncnorm.SyncBatchNorm2d(5)
    y = layer(x[my_slice(splits)])
    return y.detach().numpy(), layer.running_mean.numpy(), layer.running_var.numpy()


def test_the_split_does_not_matter() -> None:
    outcomes = []
    for splits in ([8], [4, 4], [7, 1], [3, 0, 5], [2, 2, 2, 2]):
        per_rank = run_ranks(_split_invariance, len(splits), splits)
        outcomes.append((np.concatenate([r[0] for r in per_rank]), *per_rank[0][1:]))
    for outcome in outcomes[1:]:
        for mine, first in zip(outcome, outcomes[0], strict=True):
            np.testing.assert_allclose(mine, first, rtol=0, atol=2 * 2**-23 * np.abs(first).max())


def _accumulate() -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64) * torch.arange(1, 7).view(6, 1, 1)
    mine = syncnorm.SyncBatchNorm1d(3, accumulate=3, dtype=torch.float64)
    oracle = nn.BatchNorm1d(3, dtype=torch.float64)
    part = my_slice([3, 1])
    for start in (0, 3):
        for k in range(3):
            before = mine.running_mean.clone()
            mine(batches[start + k, part])
            assert torch.equal(before, mine.running_mean) == (k < 2)
        oracle(batches[start : start + 3].flatten(0, 1))  # one update with the pooled statistics of three
    assert mine.num_batches_tracked == 2 and set(mine.state_dict()) == set(oracle.state_dict())
    return {name: float((value - oracle.state_dict()[name]).abs().max()) for name, value in mine.state_dict().items()}


def test_accumulate_pools_the_statistics_of_micro_batches() -> None:
    for per_rank in run_ranks(_accumulate, 2):
        assert max(per_rank.values()) <= 1e-12, per_rank


def _third(backend: str) -> str:
    layer = syncnorm.SyncBatchNorm1d(2, dtype=torch.float64, backend=backend)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(second.square().sum(), x)
    except syncnorm.SyncNormError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("backend", SERVING)
def test_a_third_derivative_is_refused_and_not_wrong(backend: str) -> None:
    assert all("a third was asked for" in text for text in run_ranks(_third, 2, backend))
