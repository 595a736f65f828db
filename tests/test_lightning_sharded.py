"""Tier: gloo ranks. SyncNorm under FSDP1 and under ModelParallel (FSDP2, tensor parallel), on CPU in float64.

Lightning and torch offer FSDP1 for accelerators alone; a strategy that builds the wrapper itself runs it on CPU.
"""

import traceback
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

from syncnorm import SyncNorm, SyncNormPlugin
from syncnorm.testing import run_ranks
from tests.lightning_training import (
    FEW,
    GLOBAL_BATCH,
    LR,
    MOMENTUM,
    TOLERANCE,
    Compiled,
    CompiledTraining,
    LateTraining,
    Training,
    by_hand,
    dataset,
    distance,
    fit,
    lost,
    norms,
)

pytestmark = pytest.mark.gloo

LOCAL, SYNCED = ["BatchNorm2d", "BatchNorm1d"], ["SyncBatchNorm2d", "SyncBatchNorm1d"]


class AsTheyAre(FSDPPrecision):
    """Lightning's would bring parameters and inputs to float32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


class FSDPOnCPU(FSDPStrategy):
    def _setup_model(self, model: nn.Module) -> nn.Module:
        exact = isinstance(self.precision_plugin, AsTheyAre)
        mixed = None if exact else self.mixed_precision_config
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), mixed_precision=mixed, **self.kwargs)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        # torch's own full state dict reads freed memory on CPU (segmentation fault, torch 2.13).
        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            module = self.lightning_module
            named = [*module.named_parameters(), *module.named_buffers()]
            return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named}


class FlatTraining(Training):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trainer.model.parameters(), LR, MOMENTUM)


def fsdp(
    *callbacks: Any,
    module: Any = None,
    precision: Any = None,
    plugins: tuple[Any, ...] = (),
    use_orig_params: bool = True,
    wrap: bool = True,
) -> Any:
    policy = ModuleWrapPolicy({nn.Conv2d, nn.Linear}) if wrap else None
    strategy = FSDPOnCPU(auto_wrap_policy=policy, use_orig_params=use_orig_params)
    if precision is None:
        module = FlatTraining() if module is None else module
        return fit(module, *callbacks, strategy=strategy, plugins=[AsTheyAre("32-true"), *plugins])
    module = FlatTraining(torch.float32)
    return fit(module, *callbacks, strategy=strategy, plugins=[FSDPPrecision(precision)], max_steps=FEW)


def shard(module: Any) -> None:
    mesh = module.device_mesh["data_parallel"]
    for layer in module.net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(module.net, mesh=mesh)


class EarlyTraining(Training):
    """Its layers are there from the start and are sharded in ``configure_model``."""

    def configure_model(self) -> None:
        if not isinstance(self.net, torch.distributed.fsdp.FSDPModule):
            shard(self)


class EachLayerTraining(Training):
    """Every layer is sharded by itself, the norms too."""

    def configure_model(self) -> None:
        if isinstance(self.net, torch.distributed.fsdp.FSDPModule):
            return
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ShardedCompiledTraining(CompiledTraining, EarlyTraining):
    """Sharded, then compiled, each in its turn."""

    def configure_model(self) -> None:
        EarlyTraining.configure_model(self)
        CompiledTraining.configure_model(self)


class SameDataTraining(LateTraining):
    """Every rank has the whole batch, as tensor-parallel ranks do."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=GLOBAL_BATCH)


def model_parallel(module: pl.LightningModule, *callbacks: Any, tensor_parallel: int = 1, **options: Any) -> Any:
    strategy = ModelParallelStrategy(
        data_parallel_size=2 // tensor_parallel,
        tensor_parallel_size=tensor_parallel,
        save_distributed_checkpoint=False,
    )
    return fit(module, *callbacks, strategy=strategy, **options)


def few_steps(*callbacks: Any, precision: str) -> Any:
    return model_parallel(EarlyTraining(torch.float32), *callbacks, precision=precision, max_steps=FEW)


def each_layer() -> Any:
    """Converted before it is sharded; and again, when it is sharded already."""
    module = EachLayerTraining()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    first = model_parallel(module, SyncNorm())
    with torch.no_grad():
        for name, value in module.state_dict().items():
            is_dtensor = isinstance(value, DTensor)
            value.copy_(
                distribute_tensor(start[name], value.device_mesh, value.placements) if is_dtensor else start[name]
            )
    second = model_parallel(module, SyncNorm())
    usable = [isinstance(layer, torch.distributed.fsdp.FSDPModule) for layer in norms(module)]
    return first | {"second": second, "usable": usable}


def group_norm_too_late() -> Any:
    try:
        model_parallel(LateTraining(shard), SyncNorm(to="group_norm"))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


CASES = {
    "fsdp": lambda: fsdp(SyncNorm()),
    "fsdp, plugin": lambda: fsdp(plugins=(SyncNormPlugin(),)),
    "fsdp, flat": lambda: fsdp(SyncNorm(), use_orig_params=False),
    "fsdp, flat, plugin": lambda: fsdp(plugins=(SyncNormPlugin(),), use_orig_params=False),
    "fsdp, without": lambda: fsdp(),
    "fsdp, compiled": lambda: fsdp(SyncNorm(), Compiled(), module=torch.compile(FlatTraining(), backend="aot_eager")),
    "fsdp, bf16-mixed": lambda: fsdp(SyncNorm(), precision="bf16-mixed"),
    "fsdp, bf16-mixed, without": lambda: fsdp(precision="bf16-mixed"),
    "fsdp, bf16-mixed, one unit": lambda: fsdp(SyncNorm(), precision="bf16-mixed", wrap=False),
    "fsdp, bf16-true": lambda: fsdp(SyncNorm(), precision="bf16-true"),
    # In one unit, as torch's batch norm takes no bfloat16 beside the float32 that FSDP keeps for norms (CPU, torch 2.13).
    "fsdp, bf16-true, without": lambda: fsdp(precision="bf16-true", wrap=False),
    "fsdp2": lambda: model_parallel(EarlyTraining(), SyncNorm()),
    "fsdp2, late": lambda: model_parallel(LateTraining(shard), SyncNorm()),
    "fsdp2, without": lambda: model_parallel(LateTraining(shard)),
    "fsdp2, compiled": lambda: model_parallel(ShardedCompiledTraining(), SyncNorm(), Compiled()),
    "fsdp2, bf16-mixed": lambda: few_steps(SyncNorm(), precision="bf16-mixed"),
    "fsdp2, bf16-mixed, without": lambda: few_steps(precision="bf16-mixed"),
    "fsdp2, plugin": lambda: model_parallel(LateTraining(shard), plugins=[SyncNormPlugin()]),
    "tensor parallel": lambda: model_parallel(SameDataTraining(shard), SyncNorm(), tensor_parallel=2),
    "tensor parallel, world": lambda: model_parallel(
        SameDataTraining(shard), SyncNorm(process_group="world"), tensor_parallel=2
    ),
    "fsdp2, each layer": each_layer,
    "fsdp2, bf16": lambda: model_parallel(EarlyTraining(torch.float32), SyncNorm(), precision="bf16-true", max_steps=1),
    "fsdp2, bf16, late": lambda: model_parallel(LateTraining(shard), SyncNorm(), precision="bf16-true", max_steps=1),
    "group norm": group_norm_too_late,
}


def run_cases(names: list[str]) -> dict[str, Any]:
    outcomes: dict[str, Any] = {}
    for name in names:
        try:
            outcomes[name] = CASES[name]()
        except BaseException:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def case() -> Any:
    outcomes = run_ranks(run_cases, 2, list(CASES), timeout=110)

    def outcome(name: str) -> Any:
        for rank in (0, 1):
            assert not isinstance(outcomes[rank][name], str), f"rank {rank}: {outcomes[rank][name]}"
        return outcomes[0][name]

    return outcome


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, Tensor]:
    return by_hand()


@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        "fsdp, plugin",
        "fsdp, flat",
        "fsdp, flat, plugin",
        "fsdp, compiled",
        "fsdp2",
        "fsdp2, late",
        "fsdp2, compiled",
        "tensor parallel",
    ],
)
def test_two_ranks_equal_one_process(case: Any, whole_batch: Any, name: str) -> None:
    run = case(name)
    assert run["during"] == SYNCED
    assert run["after"] == LOCAL
    assert distance(run["state"], whole_batch) < TOLERANCE


@pytest.mark.parametrize("name", ["fsdp, without", "fsdp2, without"])
def test_without_it_the_same_comparison_fails(case: Any, whole_batch: Any, name: str) -> None:
    assert distance(case(name)["state"], whole_batch) > 1e-3


def test_norms_that_are_sharded_themselves(case: Any, whole_batch: Any) -> None:
    run = case("fsdp2, each layer")
    for fitted in (run, run["second"]):
        assert fitted["during"] == ["FSDPSyncBatchNorm2d", "FSDPSyncBatchNorm1d"]
        assert fitted["after"] == ["FSDPBatchNorm2d", "FSDPBatchNorm1d"]
        assert distance(fitted["state"], whole_batch) < TOLERANCE
    assert run["usable"] == [True, True]


@pytest.mark.parametrize("name", ["fsdp2, bf16", "fsdp2, bf16, late"])
def test_statistics_stay_float32_under_bf16(case: Any, name: str) -> None:
    run, exact = case(name), by_hand(steps=1)
    assert run["during"] == SYNCED
    assert set(run["dtypes"]) == {torch.float32}
    assert run["state"]["net.0.weight"].dtype == torch.bfloat16
    # The convolution rounds to 8 bits, its input too: 2^-8 each, on values of about 2 with momentum 0.1.
    gap = (run["state"]["net.1.running_mean"].double() - exact["net.1.running_mean"]).abs().max()
    assert gap < 2 * 2 * 2**-8 * 0.1


@pytest.mark.parametrize("name", ["fsdp, bf16-mixed", "fsdp, bf16-true", "fsdp2, bf16-mixed"])
def test_half_precision_loses_what_it_loses_in_one_process(case: Any, name: str) -> None:
    precision = name.split(", ")[1]
    assert lost(case(name)["state"], precision) < 2
    assert set(case(name)["dtypes"]) == {torch.float32}
    assert lost(case(f"{name}, without")["state"], precision) > 20


def test_statistics_in_the_only_unit_of_fsdp1_become_bfloat16(case: Any) -> None:
    """FSDP1 does it to all buffers; with an ``auto_wrap_policy`` it spares batch norms. In README's footnotes."""
    assert set(case("fsdp, bf16-mixed, one unit")["dtypes"]) == {torch.bfloat16}


def test_the_plugin_is_ignored_under_model_parallel(case: Any, whole_batch: Any) -> None:
    """Documented on the plugin; if Lightning begins to ask it, the documentation wants changing."""
    assert case("fsdp2, plugin")["during"] == LOCAL


def test_tensor_parallel_ranks_do_not_count_twice(case: Any, whole_batch: Any) -> None:
    twice = case("tensor parallel, world")["state"]
    assert abs(twice["net.1.running_var"] / whole_batch["net.1.running_var"] - 1).max() > 1e-3
    assert distance({"mean": twice["net.1.running_mean"]}, {"mean": whole_batch["net.1.running_mean"]}) < TOLERANCE


def test_group_norm_too_late_for_sharding(case: Any) -> None:
    text = case("group norm")["error"]
    assert text.startswith("SyncNormError: SyncNorm: to='group_norm'")
    assert "Convert before sharding; nothing was changed. Call syncnorm.convert(self, to='group_norm')" in text
