"""Tier: no process. The schedule of batch renormalisation, and the statistics families through the Lightning callback."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm
from syncnorm.modules import BatchRenorm1d, FrozenBatchNorm1d, GhostBatchNorm1d


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Spy(Callback):
    """Notes the class and the limits of the norm at every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, type, float | None, float | None]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        norm = pl_module.net[1]
        limits = (norm.r_max, norm.d_max) if isinstance(norm, BatchRenorm1d) else (None, None)
        self.seen.append((trainer.global_step - 1, type(norm), *limits))


def loader() -> DataLoader:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def fit(model: Tiny, *callbacks: Callback, ckpt_path: str | None = None, epochs: int = 3, **options: Any) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer


def schedule() -> syncnorm.RenormSchedule:
    return syncnorm.RenormSchedule(warmup_steps=2, r_steps=10, d_steps=6, r_max=3.0, d_max=4.0, every_n_steps=1)


def test_limits_follow_the_papers_ramps() -> None:
    paper = syncnorm.RenormSchedule()
    assert [paper.limits(step) for step in (0, 5_000, 15_000, 22_500, 25_000, 40_000, 99_000)] == [
        (1.0, 0.0), (1.0, 0.0), (1 + 2 * 10 / 35, 2.5), (2.0, 4.375), (1 + 2 * 20 / 35, 5.0), (3.0, 5.0), (3.0, 5.0)
    ]  # fmt: skip
    at_once = syncnorm.RenormSchedule(0, 0, 0)
    assert at_once.limits(0) == (3.0, 5.0)


def test_a_fit_widens_the_limits_logs_them_and_gives_batch_norm_back() -> None:
    model, spy = Tiny(), Spy()
    trainer = fit(model, syncnorm.SyncNorm(to="batch_renorm"), schedule(), spy)
    assert [entry[1] for entry in spy.seen] == [BatchRenorm1d] * 12
    for step, _, r_max, d_max in spy.seen:
        assert r_max == pytest.approx(1 + 2 * min(max((step - 2) / 8, 0), 1))
        assert d_max == pytest.approx(4 * min(max((step - 2) / 4, 0), 1))
    assert {"sn/r_max", "sn/d_max", "sn/clip_r", "sn/clip_d"} <= set(trainer.logged_metrics)
    assert type(model.net[1]) is nn.BatchNorm1d


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, first = Tiny(), Tiny()
    first.load_state_dict(whole.state_dict())
    spy = Spy()
    fit(whole, syncnorm.SyncNorm(to="batch_renorm"), schedule(), epochs=4)
    trainer = fit(first, syncnorm.SyncNorm(to="batch_renorm"), schedule(), epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Tiny()
    fit(second, syncnorm.SyncNorm(to="batch_renorm"), schedule(), spy, epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert spy.seen[0][0] == 8
    assert spy.seen[0][2] == pytest.approx(1 + 2 * 6 / 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"to": "ghost_batch_norm", "virtual_batch_size": 4}, GhostBatchNorm1d),
        ({"to": "frozen_batch_norm"}, FrozenBatchNorm1d),
        ({"to": "batch_renorm", "r_max": 2.0}, BatchRenorm1d),
    ],
    ids=lambda value: value["to"] if isinstance(value, dict) else "",
)
def test_each_family_is_there_while_fitting_and_gone_afterwards(options: dict[str, Any], expected: type) -> None:
    model, spy = Tiny(), Spy()
    weight = model.net[1].weight.detach().clone()
    fit(model, syncnorm.SyncNorm(**options), spy, epochs=1)
    assert {entry[1] for entry in spy.seen} == {expected}
    assert type(model.net[1]) is nn.BatchNorm1d
    assert model.net[1].weight.requires_grad
    assert torch.equal(model.net[1].weight, weight) == (expected is FrozenBatchNorm1d)


def test_bad_schedules_are_refused_and_a_useless_one_is_said() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps must be at least 0 and at most d_steps; got 30 and 20"):
        syncnorm.RenormSchedule(30, 40, 20)
    with pytest.raises(ValueError, match=r"warmup_steps must be at least 0 and at most r_steps; got 30 and 25"):
        syncnorm.RenormSchedule(30, 25, 40)
    with pytest.raises(ValueError, match=r"warmup_steps must be at least 0 and at most r_steps; got -1 and 25"):
        syncnorm.RenormSchedule(-1, 25, 40)
    with pytest.raises(ValueError, match=r"r_max must be at least 1 and d_max at least 0; got 0\.5 and 5\.0"):
        syncnorm.RenormSchedule(r_max=0.5)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        syncnorm.RenormSchedule(every_n_steps=0)
    with pytest.raises(TypeError, match="to='ghost_batch_norm' needs virtual_batch_size"):
        syncnorm.SyncNorm(to="ghost_batch_norm")
    model, trainer = (
        Tiny(),
        Trainer(accelerator="cpu", devices=1, fast_dev_run=1, enable_progress_bar=False, callbacks=[schedule()]),
    )
    with pytest.warns(UserWarning, match="RenormSchedule found no batch renormalisation layer, so it has no effect"):
        trainer.fit(model, loader())
