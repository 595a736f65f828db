"""Tier: no process. What plan and inspect say, and that they only look."""

import warnings

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm import modules
from syncnorm.conversion._targets import TARGETS


class Fused(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def net() -> nn.ModuleDict:
    shared = nn.BatchNorm2d(48)
    return nn.ModuleDict(
        {"a": shared, "b": nn.Sequential(shared, Fused(4)), "c": nn.LayerNorm(4), "d": nn.BatchNorm1d(4)}
    )


def test_the_table_says_what_happens_and_why() -> None:
    assert str(syncnorm.plan(net(), "group_norm", exclude="d")).splitlines() == [
        "to group_norm: 1 replace, 1 keep, 1 skip",
        "layer  class        action   becomes                       reason",
        "a      BatchNorm2d  replace  GroupNorm(48, num_groups=16)  32 does not divide 48, 16 = gcd(32, 48) does; weight and "
        "bias carried over; running statistics dropped; also b.0",
        "b.1    Fused        skip     Fused                         Fused may do more than batch norm; "
        "syncnorm.register_adapter teaches it, or exclude it",
        "d      BatchNorm1d  keep     BatchNorm1d                   excluded by 'd'",
    ]


def test_entries_are_data() -> None:
    plan = syncnorm.plan(net(), include="a", process_group="node")
    entry = plan.entries[0]
    assert (entry.name, entry.aliases, entry.source, entry.target) == ("a", ("b.0",), "BatchNorm2d", "SyncBatchNorm2d")
    assert (entry.action, entry.reason) == ("swap", "group node")
    assert plan.counts == {"swap": 1, "replace": 0, "keep": 2, "skip": 0}
    assert (plan.to, plan.options) == ("sync_batch_norm", {"process_group": "node"})


def test_planning_changes_nothing() -> None:
    model = net()
    before = [set(vars(module)) for module in model.modules()]
    types = [type(module) for module in model.modules()]
    for to in ("sync_batch_norm", "group_norm", "layer_norm", "instance_norm"):
        syncnorm.plan(model, to)
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == before


def test_convert_does_exactly_what_plan_said() -> None:
    for to in ("sync_batch_norm", "group_norm", "layer_norm", "instance_norm"):
        model = net()
        plan = syncnorm.plan(model, to, exclude=Fused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of group counts
            syncnorm.convert(model, to, exclude=Fused)
        for entry in plan.entries:
            for name in (entry.name, *entry.aliases):
                assert type(model.get_submodule(name)).__name__ == entry.target.partition("(")[0]


def test_a_model_that_is_the_layer() -> None:
    assert "(the model itself)  BatchNorm1d  swap    SyncBatchNorm1d  group world" in str(
        syncnorm.plan(nn.BatchNorm1d(2))
    )


def test_nothing_to_convert() -> None:
    assert str(syncnorm.plan(nn.Linear(2, 2))) == "to sync_batch_norm: nothing to convert\n"


def test_strict_raises_when_planning_too() -> None:
    with pytest.raises(syncnorm.SyncNormError, match="strict=True, and 1 layers cannot be converted to 'layer_norm'"):
        syncnorm.plan(net(), "layer_norm", strict=True)


# inspect


def row(model: nn.Module) -> "syncnorm.diagnostics.NormRow":
    (only,) = syncnorm.inspect(model).rows
    return only


def test_inspect_reports_every_kind_of_norm() -> None:
    model = net()
    syncnorm.convert(model, include="d", process_group=2)
    report = syncnorm.inspect(model)
    assert [(r.name, r.type, r.features, r.group) for r in report.rows] == [
        ("a", "BatchNorm2d", "48", "local"),
        ("b.1", "Fused", "4", "local"),
        ("c", "LayerNorm", "4", "sample"),
        ("d", "SyncBatchNorm1d", "4", "2"),
    ]
    assert report.rows[0].aliases == ("b.0",)
    assert [r.affine for r in report.rows] == ["weight, bias"] * 4
    text = str(report).splitlines()
    assert text[0] == "1 × BatchNorm2d, 1 × Fused, 1 × LayerNorm, 1 × SyncBatchNorm1d"
    assert text[1].split() == ["layer", "class", "features", "affine", "statistics", "group", "notes"]
    assert text[2].endswith("also b.0")


def test_inspect_reports_what_is_no_batch_norm_and_meets_ranks() -> None:
    made = [
        (modules.BatchNormLSTM(3, 4, max_length=5, process_group=2), ("4", "weight, bias", "float32", "2")),
        (modules.LayerNormLSTM(3, 4), ("4", "weight, bias", "", "sample")),
        (modules.RunningNorm((2, 3)), ("2×3", "no", "float64", "world")),
        (modules.Standardize(3, process_group="node"), ("3", "no", "float64", "node")),
        (modules.SwitchableNorm2d(3), ("3", "weight, bias", "float32", "world")),
    ]
    for module, expected in made:
        shown = row(module)
        assert (shown.features, shown.affine, shown.dtype, shown.group) == expected, shown


def test_inspect_doubts_broken_statistics() -> None:
    layer = nn.BatchNorm1d(4)
    layer.running_var[:2] = torch.tensor([-1.0, float("nan")])
    assert row(layer).notes == (
        "running_var is not finite in 1 of 4 channels",
        "running_var is negative in 1 of 4 channels",
    )


def test_inspect_notes() -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(2).eval())
    assert row(frozen).notes == ("in evaluation mode, the model is not",)
    assert row(nn.BatchNorm1d(2, momentum=None)).notes == ("momentum=None, a cumulative average",)
    assert row(nn.BatchNorm1d(2, track_running_stats=False)).notes == (
        "no running statistics: evaluation uses the batch",
    )
    assert "in half precision" in row(nn.BatchNorm1d(2).half()).notes[0]
    assert row(nn.BatchNorm1d(2).half()).dtype == "float16"
    assert row(Fused(2)).notes[0].startswith("convert would leave it: Fused may do more")
    assert row(nn.LazyBatchNorm1d()).notes[0].startswith("convert would leave it: lazy")
    assert row(syncnorm.convert(nn.BatchNorm1d(2), "layer_norm")).notes == ("in place of BatchNorm1d",)
    assert row(syncnorm.convert(nn.BatchNorm1d(2), accumulate=3)).notes == ("statistics over 3 micro-batches",)
    assert row(nn.BatchNorm1d(2, affine=False)).affine == "no"
    with syncnorm.disabled(syncnorm.convert(nn.BatchNorm1d(2))) as disabled:
        assert row(disabled).group == "world, disabled"
    assert row(nn.SyncBatchNorm(2)).group == "world"
    assert str(syncnorm.inspect(nn.Linear(1, 1))) == (
        "no normalisation layer of torch, syncnorm or like torch's batch norm"
    )


@pytest.mark.filterwarnings("ignore:.*is a norm and an activation in one")
@pytest.mark.parametrize("to", [to for to, target in TARGETS.items() if not target.swaps])
def test_inspect_knows_every_replacement(to: str) -> None:
    shown = row(syncnorm.convert(nn.BatchNorm2d(32), to))
    assert shown.features.split(" ")[0] == "32"
    assert shown.notes == ("in place of BatchNorm2d",)
    assert shown.group == ("world" if "process_group" in TARGETS[to].options else "sample")


def test_inspect_on_meta_and_on_no_model() -> None:
    assert row(nn.BatchNorm1d(2, device="meta")).dtype == "float32"
    with pytest.raises(TypeError, match=r"inspect takes an nn.Module, got int"):
        syncnorm.inspect(3)  # type: ignore[arg-type]
