"""Tier: gloo ranks. syncnorm.convert in a loop of Lightning Fabric, before and after fabric.setup."""

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, DistributedSampler

import syncnorm
from syncnorm.testing import run_ranks
from tests.lightning_training import GLOBAL_BATCH, LR, MOMENTUM, TOLERANCE, by_hand, dataset, distance, kinds, network

pytestmark = pytest.mark.gloo


def train(when: str, precision: str = "64-true", *, compiled: bool = False) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision=precision)
    fabric.launch()
    net = network(torch.float64 if precision == "64-true" else torch.float32)
    torch.set_default_dtype(torch.float64)  # to which Fabric brings a model's output; these ranks do nothing else
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM)
    if when == "before":
        syncnorm.convert(net)
    torch._dynamo.reset()
    counters.clear()
    born = torch.compile(net, backend="aot_eager") if compiled else net
    model, optimizer = fabric.setup(born, optimizer)
    if when == "after":
        assert syncnorm.convert(model) is model
    during = kinds(model)
    sampler = DistributedSampler(dataset(), fabric.world_size, fabric.global_rank, shuffle=False)
    for x, y in fabric.setup_dataloaders(
        DataLoader(sampler.dataset, batch_size=GLOBAL_BATCH // fabric.world_size, sampler=sampler),
        use_distributed_sampler=False,
    ):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    assert bool(counters["stats"]["unique_graphs"]) == compiled
    state = {f"net.{name}": value.detach().clone() for name, value in net.state_dict().items()}
    dtypes = {layer.running_var.dtype for layer in net.modules() if hasattr(layer, "running_var")}
    syncnorm.revert(model)
    torch.set_default_dtype(torch.float32)
    return {"state": state, "during": during, "after": kinds(net), "dtypes": dtypes}


def recalibrate_alone() -> tuple[int, list[float]]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = fabric.setup(nn.BatchNorm1d(2))
    batches = [torch.arange(3.0)[:, None].expand(3, 2), torch.ones(3, 2)] if fabric.global_rank else []
    samples = syncnorm.recalibrate(model, batches, None)
    return samples, model.module.running_var.tolist()


def train_all() -> dict[str, Any]:
    runs = {when: train(when) for when in ("before", "after", "never")}
    runs |= {"bf16-true": train("before", "bf16-true"), "bf16-true, after": train("after", "bf16-true")}
    runs |= {f"compiled, {when}": train(when, compiled=True) for when in ("before", "after")}
    return runs | {"bf16-mixed": train("before", "bf16-mixed"), "one has the data": recalibrate_alone()}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_ranks(train_all, 2, timeout=90)


@pytest.mark.parametrize("when", ["before", "after", "compiled, before", "compiled, after"])
def test_two_ranks_equal_one_process(runs: list[dict[str, Any]], when: str) -> None:
    for outcome in runs:
        assert outcome[when]["during"] == ["SyncBatchNorm2d", "SyncBatchNorm1d"]
        assert outcome[when]["after"] == ["BatchNorm2d", "BatchNorm1d"]
        assert distance(outcome[when]["state"], by_hand()) < TOLERANCE


def test_without_it_the_same_comparison_fails(runs: list[dict[str, Any]]) -> None:
    assert distance(runs[0]["never"]["state"], by_hand()) > 1e-3


@pytest.mark.parametrize("name", ["bf16-true", "bf16-true, after", "bf16-mixed"])
def test_statistics_stay_float32_under_bf16(runs: list[dict[str, Any]], name: str) -> None:
    one, other = (outcome[name] for outcome in runs)
    assert one["state"]["net.0.weight"].dtype == (torch.bfloat16 if "true" in name else torch.float32)
    assert one["dtypes"] == {torch.float32}
    assert distance(one["state"], other["state"]) == 0


def test_recalibrate_where_one_rank_has_the_data(runs: list[dict[str, Any]]) -> None:
    # Fabric's wrapper hides DDP, whose first forward broadcasts buffers. Of 0, 1, 2, 1, 1, 1 the squares sum up to 2.
    assert [outcome["one has the data"] for outcome in runs] == [(6, pytest.approx([0.4, 0.4]))] * 2
