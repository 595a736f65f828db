"""What NormMonitor costs: the batches of a run under Lightning that it looks at, against those between them.

    python scripts/monitor_cost.py                          the digits perceptron, whose steps are as short as steps get
    python scripts/monitor_cost.py --model resnet           a ResNet-18 on 32×32 images, 20 batch norms
    python scripts/monitor_cost.py --ranks 2 --sync         on two ranks, synchronised

It looks at every tenth batch, and the medians of both kinds are compared, by wall clock and by CPU: neighbours in one run, so
that other work on the machine hits both. What a look adds, spread over --every steps, is to stay below 3 % of a step. CPU time
is that of one rank and does not wait. What Lightning itself takes for a callback that does nothing is not in it.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm

WARM_UP, LOOKS = 20, 10


class Clock(Callback):
    """Notes what each batch takes between the first and the last callback of each hook."""

    def __init__(self, out: Path, times: list[Any], *, is_last: bool) -> None:
        self.out, self.times, self.is_last = out, times, is_last

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.is_last:
            self.times.append((time.perf_counter(), time.process_time()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.is_last:
            began = self.times[-1]
            self.times[-1] = (time.perf_counter() - began[0], time.process_time() - began[1])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.is_last and trainer.is_global_zero:
            self.out.write_text(json.dumps(self.times))


class Training(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def resnet18() -> nn.Module:
    """A ResNet-18 for 32×32 images, from transformers' parts of the same shape."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    return Logits()


def digits() -> nn.Module:
    """The perceptron of the demo."""
    layers: list[nn.Module] = []
    for width in (64, 128, 128):
        layers += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


MODELS = {"digits": (digits, (64,)), "resnet": (resnet18, (3, 32, 32))}


def run(arguments: argparse.Namespace, folder: Path) -> list[list[float]]:
    """Seconds of each batch, wall clock and CPU."""
    torch.manual_seed(0)
    make, shape = MODELS[arguments.model]
    data = TensorDataset(torch.randn(arguments.batch * 64, *shape), torch.randint(0, 10, (arguments.batch * 64,)))
    number = arguments.steps * arguments.batch * arguments.ranks
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=number)
    out, times = folder / "times.json", []
    monitor = syncnorm.NormMonitor(LOOKS, heat_map=False)
    trainer = Trainer(
        accelerator="cpu", devices=arguments.ranks, strategy="ddp_fork" if arguments.ranks > 1 else "auto",
        max_epochs=1, logger=CSVLogger(folder), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        callbacks=[
            Clock(out, times, is_last=False), *([syncnorm.SyncNorm()] if arguments.sync else []), monitor,
            Clock(out, times, is_last=True),
        ],
    )  # fmt: skip
    trainer.fit(Training(make()), DataLoader(data, arguments.batch, sampler=sampler))
    return json.loads(out.read_text())


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples per rank")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="every_n_steps")
    parser.add_argument("--sync", action="store_true", help="with SyncNorm")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        times = run(arguments, Path(folder))
    print(
        f"{arguments.model}, {arguments.ranks} ranks of {arguments.batch}, {'' if arguments.sync else 'not '}synchronised"
    )
    for kind, clock in enumerate(("wall clock", "CPU")):
        taken = [1e3 * both[kind] for both in times]
        looks = [t for step, t in enumerate(taken, 1) if step > WARM_UP and step % LOOKS == 0]
        others = [t for step, t in enumerate(taken, 1) if step > WARM_UP and step % LOOKS]
        plain, added = statistics.median(others), statistics.median(looks) - statistics.median(others)
        print(
            f"{clock:<10}  {plain:.2f} ms a step, a look adds {added:.2f} ms: {100 * added / plain / arguments.every:.1f} % "
            f"with every_n_steps={arguments.every}"
        )


if __name__ == "__main__":
    main()
