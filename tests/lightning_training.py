"""One small training for all Lightning tests: as a LightningModule of either flavour, and by hand on the whole batch.

The samples of odd index are shifted, so that the two ranks (each takes every second sample) do not see the same
distribution, and a layer that forgets to meet is off by far more than rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytorch_lightning as pl_old
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

GLOBAL_BATCH = 4
NUM_SAMPLES = 48  # 12 steps an epoch
LR, MOMENTUM = 0.05, 0.9
EPS64 = 2.0**-52
# Rounding grows with the steps: 1.6e-15 after one and 2e-14 after twenty, measured on a small ResNet. 1e-10 leaves room
# for 36 steps; a layer that does not meet is off by more than 1e-3 after one.
TOLERANCE = 1e-10


def dataset(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_SAMPLES, 3, 5, 5, generator=generator, dtype=torch.float64)
    x[1::2] = 2 * x[1::2] + 1.5
    return TensorDataset(x.to(dtype), torch.randint(4, (NUM_SAMPLES,), generator=generator))


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    drawn = torch.float32  # whatever the default where it is made: torch 2.11 draws other numbers in bfloat16
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False, dtype=drawn),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 8, dtype=drawn),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4, dtype=drawn),
    ).to(dtype)


@functools.cache
def by_hand(epochs: int = 1, steps: int | None = None, precision: str = "64-true") -> dict[str, Tensor]:
    """State after training in one process on whole batches, with torch alone."""
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}.get(
        precision, torch.float32
    )
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    net = network(dtype)
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM)
    batches = list(DataLoader(dataset(dtype), GLOBAL_BATCH)) * epochs
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        with torch.autocast("cpu", half, enabled=precision.endswith("mixed")):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return {f"net.{name}": value.detach() for name, value in net.state_dict().items()}


FEW = 3  # steps after which half precision has lost less than a hundredth of what a layer that does not meet is off


def lost(state: dict[str, Tensor], precision: str) -> float:
    """How far ``state`` is from one process of that precision after a few steps, in units of what that one has lost.

    Two runs that round in different places are about as far from the exact one, and at most both their losses apart: 2.
    """
    one = by_hand(steps=FEW, precision=precision)
    return distance(state, one) / distance(one, by_hand(steps=FEW))


class _Training:
    """What both flavours of LightningModule share."""

    net: nn.Module
    trainer: Any
    fail_at_step: int | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning's own sampler always shuffles; in order, the ranks' batches of one step make up one of by_hand.
        trainer = self.trainer
        dtype = next(self.net.parameters()).dtype
        sampler = DistributedSampler(dataset(dtype), trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(sampler.dataset, batch_size=GLOBAL_BATCH // trainer.world_size, sampler=sampler)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at_step:
            raise RuntimeError("the training step fails")
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)  # type: ignore[attr-defined]

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR, MOMENTUM)  # type: ignore[attr-defined]


class Training(_Training, pl.LightningModule):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = network(dtype)


class OldTraining(_Training, pl_old.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()


class LateTraining(_Training, pl.LightningModule):
    """Its layers are born in ``configure_model``; ``build`` may shard or convert them there."""

    def __init__(self, build: Callable[["LateTraining"], None] | None = None) -> None:
        super().__init__()
        self.build = build

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()
            if self.build is not None:
                self.build(self)


class CompiledTraining(Training):
    """Compiled in the process that trains it: a compiled module cannot be sent to another."""

    def configure_model(self) -> None:
        self.net.forward = torch.compile(self.net.forward, backend="aot_eager")  # type: ignore[method-assign]


class Compiled(pl.Callback):
    """Fails a fit of which nothing was compiled."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        torch._dynamo.reset()
        counters.clear()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


class Probe(pl.Callback, pl_old.Callback):
    """Notes the classes and dtypes of the norm layers while they train, and the whole state at the end."""

    def __init__(self) -> None:
        self.during: list[str] = []
        self.dtypes: list[torch.dtype] = []
        self.state: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        layers = norms(pl_module)
        self.during = [type(layer).__name__ for layer in layers]
        self.dtypes = [layer.running_var.dtype for layer in layers if getattr(layer, "running_var", None) is not None]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        self.state = {name: value.detach().cpu().clone() for name, value in state.items()}


def norms(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm | nn.GroupNorm | nn.InstanceNorm2d)]


def kinds(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in norms(module)]


def fields(module: nn.Module) -> list[list[str]]:
    """Names of everything that hangs on the norm layers: what a conversion must not leave behind."""
    return [sorted([*layer.__dict__, *layer._buffers, *layer._parameters]) for layer in norms(module)]


def make_trainer(package: Any = pl, *, callbacks: tuple[Any, ...] = (), **options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    defaults = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, "limit_val_batches": 0}
    return package.Trainer(callbacks=list(callbacks), use_distributed_sampler=False, **{**quiet, **defaults, **options})


def fit(module: Any, *callbacks: Any, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    """Fit and report, as plain data: classes during and after, state at the end of training."""
    probe = Probe()
    old = isinstance(module, pl_old.LightningModule)
    trainer = make_trainer(pl_old if old else pl, callbacks=(*callbacks, probe), **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return {"during": probe.during, "dtypes": probe.dtypes, "state": probe.state, "after": kinds(module)}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference over all entries, which must be the same ones."""
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)
