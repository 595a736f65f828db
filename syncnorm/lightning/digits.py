"""Real data and a model to try things on: scikit-learn's handwritten digits, and an MLP with batch norm.

An MLP and not a CNN: the count behind a statistic is batch × height × width, so an 8×8 CNN hides what a small batch
does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from syncnorm.lightning._flavours import LightningDataModule, LightningModule
from syncnorm.testing._digits import digits, need_digits

__all__ = ["DigitsDataModule", "DigitsMLP"]


class DigitsDataModule(LightningDataModule):
    """Scikit-learn's 1,797 handwritten digits, 8×8: 1,000 to train on, 797 held out. No download.

    The split is the same on every rank and in every run. The held-out digits serve to validate and to test: nothing is
    selected on them unless you do.

    Args:
        batch_size: Digits per rank and step.
        num_workers: Processes that load data, per rank; the data lies in memory, so 0 is fastest.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If ``batch_size`` is not positive.
    """

    def __init__(self, batch_size: int = 2, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is the number of digits per rank, at least 1; got {batch_size}.")
        need_digits()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str | None = None) -> None:
        train_x, train_y, held_out_x, held_out_y = digits()
        self._train, self._held_out = TensorDataset(train_x, train_y), TensorDataset(held_out_x, held_out_y)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # drop_last: a last batch of one digit has no variance without the other ranks.
        return DataLoader(
            self._train, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # batch_size by name: predict builds the loader anew, and Lightning 2.6 cannot if it came by position.
        return DataLoader(self._held_out, batch_size=256, num_workers=self.num_workers)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class DigitsMLP(LightningModule):
    """A 64-128-128-128-10 perceptron with batch norm after each hidden layer, trained with SGD and a cosine schedule.

    It logs ``train/loss``, ``val/loss``, ``val/acc`` and ``test/acc``; ``predict`` gives the most likely digit.

    Args:
        width: Units in each hidden layer.
        lr: Learning rate at the start. The default fits a global batch of 4; scale it in proportion to the batch.
        momentum: Of SGD.
        weight_decay: Of SGD.
    """

    def __init__(self, width: int = 128, lr: float = 0.004, momentum: float = 0.9, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        layers: list[nn.Module] = []
        for num_in in (64, width, width):
            layers += [nn.Linear(num_in, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))
        self.val_acc = MulticlassAccuracy(10, average="micro")
        self.test_acc = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of ``images`` [N, 64]."""
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val/acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test/acc", self.test_acc)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
