"""Tier: gloo ranks. syncnorm.convert in a loop of Accelerate and under the Trainer of transformers: half precision, compiled.

What README offers to copy for them runs in test_readme.py, in float32.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

import syncnorm
from syncnorm.testing import run_ranks
from tests.lightning_training import (
    FEW,
    GLOBAL_BATCH,
    LR,
    MOMENTUM,
    TOLERANCE,
    by_hand,
    dataset,
    distance,
    lost,
    network,
)

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs it, too")
pytestmark = [pytest.mark.gloo, pytest.mark.slow]

PRECISIONS = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


class Net(nn.Module):
    """As the models of transformers: it computes its loss, and has the dtype that it was loaded in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = network(dtype)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def with_accelerate(model: Net, precision: str, compiled: bool, folder: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    mixed = "bf16" if precision == "bf16-mixed" else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=mixed, dynamo_backend="aot_eager" if compiled else "no")
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    loader = DataLoader(dataset(next(model.parameters()).dtype), GLOBAL_BATCH // 2)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, (x, y) in enumerate(loader):
        if step == FEW and precision in PRECISIONS:
            break
        optimizer.zero_grad()
        accelerator.backward(wrapped(x, y)["loss"])
        optimizer.step()


def with_trainer(model: Net, precision: str, compiled: bool, folder: str) -> None:
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> None:
            return None

    AcceleratorState._reset_state(True)
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        bf16=precision == "bf16-mixed",
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
        max_steps=FEW if precision in PRECISIONS else 12,
        per_device_train_batch_size=GLOBAL_BATCH // 2,
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    rows = [{"x": x, "labels": y} for x, y in dataset(next(model.parameters()).dtype)]
    InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, constant)).train()


FRAMEWORKS = {"accelerate": with_accelerate, "transformers": with_trainer}


def train(framework: str, precision: str, folder: str, *, convert: bool = True) -> dict[str, Any]:
    compiled = precision == "compiled"
    torch._dynamo.reset()
    counters.clear()
    model = Net(PRECISIONS.get(precision, torch.float64))
    if convert:
        syncnorm.convert(model)
    FRAMEWORKS[framework](model, precision, compiled, folder)
    assert bool(counters["stats"]["unique_graphs"]) == compiled
    dtypes = {layer.running_var.dtype for layer in model.modules() if hasattr(layer, "running_var")}
    return {"state": {name: value.detach().clone() for name, value in model.state_dict().items()}, "dtypes": dtypes}


def train_all(folder: str) -> dict[str, Any]:
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE="2")  # asked for, though the group is there
    runs = {}
    for framework in FRAMEWORKS:
        for precision in ("compiled", *PRECISIONS):
            runs[framework, precision] = train(framework, precision, folder)
            runs[framework, precision, "without"] = train(framework, precision, folder, convert=False)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(train_all, 2, str(tmp_path_factory.mktemp("trainer")), timeout=110)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_compiled_ranks_equal_one_process(runs: list[dict[Any, Any]], framework: str) -> None:
    for outcome in runs:
        assert distance(outcome[framework, "compiled"]["state"], by_hand()) < TOLERANCE
    assert distance(runs[0][framework, "compiled", "without"]["state"], by_hand()) > 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_half_precision_loses_what_it_loses_in_one_process(runs: Any, framework: str, precision: str) -> None:
    for outcome in runs:
        assert outcome[framework, precision]["dtypes"] == {torch.float32}
        assert lost(outcome[framework, precision]["state"], precision) < 2
    assert lost(runs[0][framework, precision, "without"]["state"], precision) > 20
