"""Tier: no process, but for the last tests. What explain says is what then happens, and asking changes nothing."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.diagnostics._exchange_meter import ExchangeMeter
from syncnorm.kernels import BACKENDS
from syncnorm.testing import count_collectives, run_ranks


def lines(text: str) -> dict[str, list[str]]:
    """The paragraphs' lines by label."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        label, _, rest = line.strip().partition(" ")
        found.setdefault(label, []).append(rest.strip())
    return found


def test_evaluation() -> None:
    assert syncnorm.explain(syncnorm.SyncBatchNorm1d(8).eval()).splitlines() == [
        "SyncBatchNorm1d(8)",
        "  group    world: no process group here, this rank alone",
        "  path     evaluation: torch's batch_norm with the running statistics, no exchange",
        "  buffers  running statistics float32 on cpu, updated by every batch",
    ]


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({}, "training, one rank: torch's batch_norm itself, no exchange"),
        (
            {"backend": "aten"},
            "the synchronised walk without an exchange, because backend='aten' was asked for by name",
        ),
        (
            {"accumulate": 2},
            "the synchronised walk without an exchange, because statistics are gathered over micro-batches",
        ),
    ],
)
def test_training_alone(arguments: dict[str, Any], path: str) -> None:
    assert lines(syncnorm.explain(syncnorm.SyncBatchNorm1d(8, **arguments)))["path"][0].endswith(path)


def test_dtypes_that_torch_does_not_take_together() -> None:
    layer = syncnorm.SyncBatchNorm1d(8, dtype=torch.float64)
    said = lines(syncnorm.explain(layer, torch.randn(4, 8)))["path"][0]
    assert said.endswith(
        "because torch's batch_norm does not take these dtypes together, or would read its counter on the host"
    )
    with pytest.raises(RuntimeError):
        nn.functional.batch_norm(
            torch.randn(4, 8), layer.running_mean, layer.running_var, layer.weight, layer.bias, True
        )
    assert layer(torch.randn(4, 8)).dtype == torch.float32


def test_each_backend_answers() -> None:
    layer = syncnorm.SyncBatchNorm2d(8, backend="reference")
    said = lines(syncnorm.explain(layer, torch.randn(2, 8, 3, 3)))["backend"]
    assert len(said) == len(BACKENDS) + 1
    assert {"aten: serves this input", "reference: serves this input, taken"} <= set(said)
    assert said[-1] == "under torch.compile: reference, which Inductor fuses with its neighbours"
    layer = syncnorm.SyncBatchNorm2d(8, backend="aten")
    said = lines(syncnorm.explain(layer, torch.empty(2, 8, 3, 3, device="meta")))["backend"]
    (aten,) = [line for line in said if line.startswith("aten: ")]
    assert aten.startswith("aten: ATen's fused operators used here exist on CPU only, the input is on meta.")
    assert aten.endswith("asked for by name: the call raises")
    assert "reference: serves this input" in said
    assert "an input is needed to ask the backends" in syncnorm.explain(layer)


def test_buffers() -> None:
    def said(**arguments: Any) -> str:
        return lines(syncnorm.explain(syncnorm.SyncBatchNorm1d(8, **arguments)))["buffers"][0]

    assert said(track_running_stats=False) == "no running statistics"
    assert said(momentum=None) == "running statistics float32 on cpu, updated by every batch as a cumulative average"
    assert said(accumulate=4) == "running statistics float32 on cpu, updated once per 4 micro-batches"
    layer = syncnorm.SyncBatchNorm1d(8)
    layer.track_running_stats = False
    assert "not updated (track_running_stats is off)" in syncnorm.explain(layer)


def test_a_model_is_run_once_without_a_trace() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6)
    )
    x = torch.randn(2, 3, 5, 5)
    model(x)
    syncnorm.convert(model, include="1", backend="reference")
    model[2].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    text = syncnorm.explain(model, x)
    assert "SyncBatchNorm2d(4) 1 on [2, 4, 3, 3] float32 on cpu" in text
    assert "reference: serves this input, taken" in text
    assert text.splitlines()[-1] == "not synchronised: BatchNorm1d 5; syncnorm.plan(model) says what convert would do"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model[1]._sync


def test_a_layer_that_the_input_does_not_reach() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = syncnorm.SyncBatchNorm1d(3), syncnorm.SyncBatchNorm1d(3, backend="reference")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    assert "an input did not reach it" in syncnorm.explain(Half(), torch.randn(2, 3))


def test_what_has_no_answer() -> None:
    assert syncnorm.explain(nn.Linear(2, 2)) == "no layer uses batch statistics"
    with pytest.raises(TypeError, match="explain takes one of our layers or a model, got int"):
        syncnorm.explain(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the input of a layer is a tensor \[N, C, \*\], got tuple"):
        syncnorm.explain(syncnorm.SyncBatchNorm1d(3), (torch.zeros(2, 3),))
    with syncnorm.disabled(syncnorm.SyncBatchNorm1d(3)) as layer:
        assert lines(syncnorm.explain(layer))["group"] == ["world: disabled, this rank alone"]


def groups() -> dict[str, str]:
    layer, said = syncnorm.SyncBatchNorm1d(3), {}
    pair = dist.new_group([0, 1])
    specs: dict[str, Any] = {"world": "world", "node": "node", "1": 1, "2": 2, "pair": pair}
    with count_collectives() as counts:
        for name, spec in specs.items():
            layer.process_group = spec
            said[name] = lines(syncnorm.explain(layer, torch.zeros(2, 3)))["group"][0]
            said[f"{name} path"] = lines(syncnorm.explain(layer, torch.zeros(2, 3)))["path"][0]
    assert not counts
    layer.process_group = "node"
    layer(torch.randn(2, 3))
    said["node after"] = lines(syncnorm.explain(layer))["group"][0]
    layer.process_group = "world"
    layer(torch.randn(2, 3))
    dist.barrier()
    dist.destroy_process_group()
    said["gone"] = lines(syncnorm.explain(layer))["group"][0]
    layer.process_group = syncnorm.distributed.GroupSpec("named", name="7", ranks=(0, 1))
    said["named gone"] = lines(syncnorm.explain(layer))["group"][0]
    return said


@pytest.mark.gloo
def test_groups_are_told_without_meeting() -> None:
    first, _, third = run_ranks(groups, 3)
    over = "one all-reduce forward, one backward"
    assert first["world"] == "world: 3 ranks"
    assert first["world path"] == f"training over 3 ranks: {over}"
    assert first["node"] == "node: ranks are counted at the first training forward"
    assert first["node path"] == f"training over the ranks of its group: {over}"
    assert first["node after"] == "node: 3 ranks"
    assert first["1"] == "1 ranks each, of 3"
    assert first["1 path"] == "training, one rank: torch's batch_norm itself, no exchange"
    assert first["2"] == "2 ranks each: a training forward raises, it does not divide the world of 3"
    assert first["pair"] == "ranks [0, 1]: 2 ranks"
    assert third["pair"].startswith("outside: a training forward raises: this rank is outside the process group")
    assert first["gone"] == "world: it had 3 ranks and now there is no process group, training raises"
    assert first["named gone"].startswith("ranks [0, 1]: a training forward raises: the layer's process group '7'")


FAMILIES = {
    "batch_renorm": ({}, "because the result is corrected towards the running statistics"),
    "ghost_batch_norm": ({"virtual_batch_size": 2}, "because every ghost has statistics of its own"),
    "moving_average_batch_norm": ({}, "because it normalises by the last batches together"),
    "frozen_batch_norm": ({}, "training as in evaluation: torch's batch_norm with the running statistics, no exchange"),
}


def family(to: str) -> nn.Module:
    return syncnorm.convert(nn.BatchNorm1d(3), to, **FAMILIES[to][0])


@pytest.mark.parametrize("to", FAMILIES)
def test_the_ways_of_other_families(to: str) -> None:
    layer = family(to)
    text = lines(syncnorm.explain(layer, torch.randn(4, 3)))
    assert text["path"][0].endswith(FAMILIES[to][1])
    before = layer.running_var.clone()
    layer(torch.randn(4, 3))
    assert text["buffers"][0].endswith("not updated (frozen)") == torch.equal(layer.running_var, before)


def ways_over_ranks() -> dict[str, tuple[str, int]]:
    told = {}
    for to, batch in [(to, 4) for to in FAMILIES] + [("ghost_batch_norm", 1)]:
        layer = family(to)
        if to == "ghost_batch_norm" and batch == 4:
            assert "agreed in the first training forward" in syncnorm.explain(layer)
        x = torch.randn(batch, 3, requires_grad=True)
        for _ in range(2):
            with ExchangeMeter() as meter:
                layer(x).square().sum().backward()
        told[f"{to} {batch}"] = lines(syncnorm.explain(layer, x))["path"][0], meter.exchanges
    return told


@pytest.mark.gloo
def test_as_many_exchanges_as_are_told() -> None:
    (told, _) = run_ranks(ways_over_ranks, 2)
    each_way = "training over 2 ranks: one all-reduce forward, one backward"
    statistics = "training over 2 ranks: one all-reduce forward, for the running statistics"
    assert told == {
        "batch_renorm 4": (each_way, 2),
        "ghost_batch_norm 4": (f"{statistics}; none backward, as a ghost is of one rank", 1),
        "ghost_batch_norm 1": (f"{statistics}; and one each way among the 2 ranks of a ghost", 3),
        "moving_average_batch_norm 4": (each_way, 2),
        "frozen_batch_norm 4": (FAMILIES["frozen_batch_norm"][1], 0),
    }


def alone() -> list[str]:
    net = syncnorm.convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    ddp = DistributedDataParallel(net)
    said = syncnorm.explain(ddp, torch.zeros(4, 2)) if dist.get_rank() == 1 else ""
    ranks = torch.ones(1)
    dist.all_reduce(ranks)  # had rank 1 met somebody before, this would be another exchange on it
    return [said, str(ranks.item()), str(ddp.broadcast_buffers)]


@pytest.mark.gloo
def test_a_rank_may_ask_alone_under_ddp() -> None:
    first, second = run_ranks(alone, 2, timeout=30)
    assert first == ["", "2.0", "True"]
    assert "training over 2 ranks" in second[0]
    assert second[1:] == first[1:]
