"""Handwritten digits on two processes at 2 samples each, with Lightning. SyncNorm is the one line that differs.

    python examples/lightning_fit.py                 # local batch norm, for comparison: --norm local
    python examples/lightning_fit.py --devices 4 --epochs 10

The classes are ordinary BatchNorm1d before and after the fit; a checkpoint has the same keys as without SyncNorm.
"""

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from syncnorm import SyncNorm


class Digits(LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        for num_in in (64, 128, 128):
            layers += [nn.Linear(num_in, 128), nn.BatchNorm1d(128), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(128, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val/acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=["sync", "local"], default="sync")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=2, help="per process")
    parser.add_argument("--steps", type=int, default=None, help="steps per epoch, if not all")
    args = parser.parse_args()

    seed_everything(0)
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train, held_out = random_split(TensorDataset(images, labels), [1000, 797])

    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs,
        limit_train_batches=args.steps,
        callbacks=[SyncNorm()] if args.norm == "sync" else [],
        logger=False,
        enable_checkpointing=False,
    )
    model = Digits(lr=0.001 * args.batch_size * args.devices)
    trainer.fit(
        model,
        DataLoader(train, args.batch_size, shuffle=True, drop_last=True),
        DataLoader(held_out, 256),
    )
    if trainer.is_global_zero:
        print(f"{args.norm}: test error {100 * (1 - trainer.callback_metrics['val/acc'].item()):.2f} %")
        print(f"after the fit: {model.net[1]}")


if __name__ == "__main__":
    main()
