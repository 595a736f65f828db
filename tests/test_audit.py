"""Tier: gloo ranks. Drift between ranks is found to the bit, named by layer, channel and rank, and repaired as asked."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm import SyncNormMismatch, audit
from syncnorm.testing import count_collectives, run_ranks

pytestmark = pytest.mark.gloo


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sequential(nn.LayerNorm(5), nn.BatchNorm1d(5)))
    return syncnorm.convert(model, **options)


def said(model: nn.Module, *args: Any, **options: Any) -> str:
    before = copy.deepcopy(model.state_dict())
    try:
        return str(audit(model, *args, **options))
    except SyncNormMismatch as error:
        after = model.state_dict()
        assert all(torch.allclose(after[name], value, 0, 0, equal_nan=True) for name, value in before.items())
        return f"raised: {error}"


def _named() -> list[str]:
    rank, texts = dist.get_rank(), []
    with count_collectives() as counts:
        texts.append(said(net()))
    assert counts == {"all_reduce": 1}

    model = net()
    if rank == 1:
        model[2][1].running_var[3] = 5.0
        model[2][1].running_var[4] = -6.0
        model[2][1].num_batches_tracked += 2
    texts.append(said(model))

    model = net()
    model[2][0].weight.data[0] += 2**-23 * (rank == 2)  # one unit in the last place
    texts.append(said(model))

    model = net()
    model[1].bias.data[1] = -0.0 if rank == 0 else 0.0
    texts.append(said(model))

    model = net()
    model[1].running_mean[2] = torch.nan if rank == 0 else float(rank)
    texts.append(said(model))
    texts.append(said(model, exclude="1"))
    texts.append(said(model, include=[nn.LayerNorm]))
    texts.append(said(nn.parallel.DistributedDataParallel(net())))
    return texts


def test_the_first_difference_is_named_on_every_rank() -> None:
    results = run_ranks(_named, 3)
    assert results[0] == results[1] == results[2]
    clean, var, ulp, zero, nan, excluded, included, wrapped = results[0]
    assert clean == wrapped == "12 tensors of norms over ranks [0, 1, 2]: the same bits on all"
    assert excluded == "7 tensors of norms over ranks [0, 1, 2]: the same bits on all"
    assert included == "2 tensors of norms over ranks [0, 1, 2]: the same bits on all"
    assert var.startswith(
        "raised: 12 tensors of norms over ranks [0, 1, 2]: 2 differ, in 1 layers (2.1). First 2.1.running_var, channel 3: "
        "ranks [0, 2] have 1; ranks [1] have 5 (largest difference 7). Nothing was changed. repair="
    )
    assert (
        "First 2.0.weight, channel 0: ranks [0, 1] have 1; ranks [2] have 1.00000012 (largest difference 1.19e-07)"
        in ulp
    )
    assert "First 1.bias, channel 1: ranks [0] have -0; ranks [1, 2] have 0 (largest difference 0)" in zero
    assert "First 1.running_mean, channel 2: ranks [0] have nan; ranks [1] have 1; ranks [2] have 2" in nan


def _repaired() -> list[Any]:
    rank, out = dist.get_rank(), []
    model = net()
    model[1].weight.data += rank
    model[2][1].running_mean[1] = torch.nan if rank == 1 else -0.0
    model[2][1].num_batches_tracked.fill_(2**40 + rank)
    report = audit(model, "broadcast")
    out += [
        bool(report),
        report.ok,
        report.repaired,
        [f"{d.layer}.{d.tensor}" for d in report.drifts],
        str(report)[:120],
    ]
    out += [model[1].weight.tolist(), str(model[2][1].running_mean[1].item()), int(model[2][1].num_batches_tracked)]
    out.append(audit(model).ok)

    model = net()
    model[2][1].running_mean.fill_(4.0 * rank - 2.0)
    report = audit(model, "pool")
    out += [report.repaired, model[2][1].running_mean.tolist(), model[2][1].running_var.tolist(), audit(model).ok]

    model[1].bias.data += rank
    model[1].running_mean += rank
    out.append(said(model, repair="pool"))
    out.append(audit(net(), "pool").repaired)
    return out


def test_repairs() -> None:
    results = run_ranks(_repaired, 2)
    assert results[0] == results[1]
    (truth, ok, how, which, text, weight, mean, counter, after, pooled, means, variances, then, refused, nothing) = (
        results[0]
    )
    assert (truth, ok, how, after) == (False, False, "broadcast", True)
    assert which == ["1.weight", "2.1.running_mean", "2.1.num_batches_tracked"]
    assert "3 differ, in 2 layers (1, 2.1); repaired by broadcast. First 1.weight" in text
    assert (weight, mean, counter) == ([1.0] * 5, "-0.0", 2**40)
    # Variance 1 on both ranks, means -2 and 2: 1 + 4, where the average of the variances would be 1.
    assert (pooled, means, variances, then) == ("pool", [0.0] * 5, [5.0] * 5, True)
    assert refused.startswith(
        'raised: repair="pool" is for running_mean, running_var, num_batches_tracked, and 1.bias, channel 0'
    )
    assert nothing is None


def _models_differ(case: str) -> list[str]:
    rank, model = dist.get_rank(), net()
    if case == "width" and rank == 1:
        model[2][1] = nn.BatchNorm1d(7)
    if case == "more" and rank == 1:
        model.add_module("x\x1b[31m", nn.BatchNorm1d(5))
    return [said(model), said(net())]


def test_ranks_with_different_models_are_told_where_they_part() -> None:
    for case, text in (
        ("width", "ranks [0, 2] have 2.1.weight [5] torch.float32; ranks [1] have 2.1.weight [7] torch.float32"),
        ("more", "ranks [0, 2] have nothing; ranks [1] have x?[31m.weight [5] torch.float32"),
    ):
        for differing, after in run_ranks(_models_differ, 3, case):
            assert text in differing
            assert "Nothing was changed" in differing
            assert after.endswith("the same bits on all")


def _subgroups() -> list[Any]:
    rank, model = dist.get_rank(), net(process_group=2)
    for layer in (model[1], model[2][1]):
        layer.running_mean.fill_(rank // 2)  # each pair of ranks has its own statistics
    out = [said(model)]
    if rank == 3:
        model[1].running_mean[4] = 9.0
    out.append(said(model))
    out += [audit(model, "broadcast").repaired, model[1].running_mean.tolist(), audit(model).ok]
    model[1].running_mean += rank % 2
    out += [audit(model, "pool").repaired, model[1].running_mean[0].item(), model[1].running_var[0].item()]
    model[1].weight.data += rank // 2  # a parameter belongs to all
    return [*out, said(model)]


def test_a_group_of_its_own_compares_statistics_within_it() -> None:
    results = run_ranks(_subgroups, 4)
    for rank, (apart, named, how, mean, clean, pooled, new_mean, new_var, parameter) in enumerate(results):
        assert apart == "12 tensors of norms over ranks [0, 1, 2, 3]: the same bits on all"
        assert "First 1.running_mean, channel 4: ranks [2] have 1; ranks [3] have 9 (largest difference 8)" in named
        assert (how, mean, clean) == ("broadcast", [float(rank // 2)] * 5, True)
        assert (pooled, new_mean, new_var) == ("pool", rank // 2 + 0.5, 1.25)
        assert "First 1.weight, channel 0: ranks [0, 1] have 1; ranks [2, 3] have 2" in parameter


def test_a_lone_process_has_nobody_to_differ_from() -> None:
    report = audit(net(), "broadcast")
    assert report and report.ranks == (0,) and dataclasses.astuple(report)[0] == ()
    assert audit(nn.Linear(2, 2)).num_tensors == 0
    with pytest.raises(ValueError, match='repair must be "raise", "broadcast" or "pool", got \'mean\''):
        audit(net(), "mean")  # type: ignore[arg-type]
