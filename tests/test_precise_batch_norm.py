"""Tier: no process. PreciseBatchNorm: when it acts, what is validated and saved, and that training does not notice."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import syncnorm
from syncnorm import PreciseBatchNorm
from syncnorm.lightning import _precise_batch_norm
from tests.lightning_training import Training, make_trainer


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(*data().tensors, strict=True))


def data() -> TensorDataset:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return TensorDataset(x, (x.sum(1) > 3).long())


class Net(LightningModule):
    """Its norms lag: momentum 0.001."""

    def __init__(self, ema: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.001), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8),
            nn.BatchNorm1d(8, momentum=0.001), nn.Linear(8, 2),
        )  # fmt: skip
        self.ema = AveragedModel(self.net) if ema else None
        self.seen: list[Tensor] = []
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def logits(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.net[0].training
        batch = batch["b"] if isinstance(batch, dict) else batch
        self.seen.append(batch[0])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        assert not self.net[3].training
        self.validated.append(copy.deepcopy(self.net.state_dict()))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def loader(**options: Any) -> DataLoader:
    return DataLoader(data(), **{"batch_size": 6, "shuffle": True, **options})


def fit(model: LightningModule, *callbacks: Callback, train: Any = None, **options: Any) -> Any:
    defaults = {"devices": 1, "strategy": "auto", "max_epochs": 2, "limit_val_batches": 1}
    trainer = make_trainer(callbacks=callbacks, **{**defaults, "num_sanity_val_steps": 1, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(workers|Checkpoint directory|does not have many|drop_last).*")
        torch.manual_seed(1)
        trainer.fit(model, loader() if train is None else train, loader(shuffle=False))
    return trainer


def assert_precise(state: dict[str, Tensor], prefix: str = "") -> None:
    """The first norm has the moments of all the data under these weights."""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    x = data().tensors[0].double()
    z = x @ own["0.weight"].double().T + own["0.bias"].double()
    torch.testing.assert_close(own["1.running_mean"].double(), z.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own["1.running_var"].double(), z.var(0), rtol=1e-5, atol=1e-5)


def is_precise(state: dict[str, Tensor]) -> bool:
    try:
        assert_precise(state)
    except AssertionError:
        return False
    return True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int]]:
    """``num_batches`` and samples of each recalibration."""
    made: list[tuple[int | None, int]] = []

    def spy(model: Any, batches: Any, num_batches: Any, **options: Any) -> int:
        made.append((num_batches, syncnorm.recalibrate(model, batches, num_batches, **options)))
        return made[-1][1]

    monkeypatch.setattr(_precise_batch_norm, "recalibrate", spy)
    return made


def test_what_is_validated_and_saved_is_precise_and_training_does_not_notice(tmp_path: Path, calls: list) -> None:
    lagging, model = Net(), Net()
    fit(lagging)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(model, PreciseBatchNorm(), keep, enable_checkpointing=True)
    assert calls == [(4, 24)] * 2, "once an epoch: the weights are the same at its validation, end and checkpoint"
    assert [is_precise(state) for state in model.validated] == [
        False,
        True,
        True,
    ]  # the first is the sanity check
    assert not any(is_precise(state) for state in lagging.validated)
    for epoch in (0, 1):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert_precise(state, "net.")
    for one, other in zip(model.seen, lagging.seen, strict=True):
        assert torch.equal(one, other), "the same batches in the same order"
    for one, other in zip(model.parameters(), lagging.parameters(), strict=True):
        assert torch.equal(one, other), "bit for bit, dropout included"


def test_every_n_epochs_and_the_last_one(calls: list) -> None:
    model = Net()
    fit(model, PreciseBatchNorm(num_batches=2, every_n_epochs=3), max_epochs=5)
    assert [is_precise(state) for state in model.validated] == [False] * 6, "two batches are not all"
    assert calls == [(2, 12)] * 2
    calls.clear()
    fit(Net(), PreciseBatchNorm(before_validation=False, before_save=False), max_epochs=-1, max_steps=6)
    assert calls == [(4, 24)] * 2  # after 4 steps, and after the last one
    calls.clear()
    fit(Net(), PreciseBatchNorm(), max_epochs=1, val_check_interval=2)
    assert calls == [(4, 24)] * 2, "before each validation"


@pytest.mark.parametrize("before_save", [True, False])
def test_checkpoints_within_an_epoch(tmp_path: Path, calls: list, before_save: bool) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    model = Net()
    fit(model, PreciseBatchNorm(before_save=before_save), keep, enable_checkpointing=True, max_epochs=1)
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    own = {name.removeprefix("net."): value for name, value in state.items()}
    assert is_precise(own) == before_save
    assert len(calls) == 1 + before_save


def test_lightnings_weight_averaging_is_found(tmp_path: Path) -> None:
    model, average = Net(), EMAWeightAveraging(decay=0.8)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(model, average, PreciseBatchNorm(), keep, enable_checkpointing=True)
    assert [is_precise(state) for state in model.validated] == [False, True, True]
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert_precise(checkpoint["state_dict"], "net.")
    current = {name.removeprefix("net."): value for name, value in checkpoint["current_model_state"].items()}
    assert not is_precise(current)
    assert is_precise(model.net.state_dict()), "the averaged weights are the model's at the end"


@pytest.mark.parametrize("where", ["ema", lambda module: module.ema], ids=["name", "function"])
def test_an_averaged_copy_of_ones_own(where: Any) -> None:
    model = Net(ema=True)
    fit(model, PreciseBatchNorm(averaged_model=where))
    assert_precise(model.ema.module.state_dict())
    assert not is_precise(model.net.state_dict())


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_what_is_fixed_stays_fixed() -> None:
    model = Net()
    model.net[1].eval()
    before = model.net[1].running_mean.clone()
    fit(model, PreciseBatchNorm(forward="logits"))
    assert torch.equal(model.net[1].running_mean, before)
    assert not model.net[1].training and model.net[5].training
    hidden = model.net.eval()[:5](data().tensors[0])
    torch.testing.assert_close(model.net[5].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)


class Prepared(Net):
    """It sees twice what its loader gives."""

    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [2 * batch[0], batch[1]]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_batches_are_prepared_as_for_a_training_step(precision: Any) -> None:
    model = Prepared()
    fit(model, PreciseBatchNorm(), precision=precision)
    seen = model.net[0](torch.cat(model.seen[-4:]))  # the last epoch in whole
    tolerance = 1e-10 if precision == "64-true" else 0.02  # half a dozen of bfloat16's roundings, each of 2^-9
    torch.testing.assert_close(
        model.net[1].running_mean.double(), seen.double().mean(0), rtol=tolerance, atol=tolerance
    )


@pytest.mark.filterwarnings(
    "ignore:(Found 1 module|You defined a `validation_step`|Be aware that when using `ckpt_path`)"
)
def test_what_is_fixed_stays_fixed_in_an_epoch_that_is_resumed(tmp_path: Path) -> None:
    fit(Net(), ModelCheckpoint(tmp_path, "half", every_n_train_steps=2), enable_checkpointing=True, max_steps=2)
    model = Net()
    trainer = make_trainer(callbacks=[PreciseBatchNorm()], devices=1, strategy="auto", max_epochs=1)
    model.net[1].eval()
    trainer.fit(model, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(model.seen) == 2
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]["net.1.running_mean"]
    assert torch.equal(model.net[1].running_mean, kept)


def test_a_learning_rate_is_found_before_there_is_data(calls: list) -> None:
    model = Net()
    model.lr = 0.05
    fit(model, LearningRateFinder(num_training_steps=3, update_attr=False), PreciseBatchNorm(), max_epochs=1)
    assert is_precise(model.net.state_dict()) and len(calls) == 1


def test_loaders_of_every_kind(calls: list) -> None:
    fit(Net(), PreciseBatchNorm(), train=DataLoader(Stream(), batch_size=6))
    pair = {"a": loader(batch_size=8), "b": loader()}
    model = Net()
    fit(model, PreciseBatchNorm(forward=lambda m, batch: m(batch["a"][0])), train=pair)
    fit(Net(), PreciseBatchNorm(), limit_train_batches=3)
    assert calls == [(None, 24)] * 4 + [(3, 18)] * 2
    persistent = loader(shuffle=False, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    model = Net()
    fit(model, PreciseBatchNorm(), train=persistent, val_check_interval=2, max_epochs=1)
    assert torch.equal(torch.cat(model.seen), data().tensors[0]), "the epoch goes on where it was"


@pytest.mark.parametrize("progress", [TQDMProgressBar, RichProgressBar], ids=["tqdm", "rich"])
def test_a_bar_after_a_while(
    progress: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for seconds, shown in ((60.0, False), (0.0, True)):
        monkeypatch.setattr(_precise_batch_norm, "_SECONDS", seconds)
        bar = progress(refresh_rate=1)
        fit(Net(), PreciseBatchNorm(), bar, enable_progress_bar=True, max_epochs=1)
        said = capsys.readouterr()
        if progress is TQDMProgressBar:
            assert ("Recalibration: " in said.out + said.err) == shown
        else:
            tasks = [task for task in bar.progress.tasks if "Recalibration" in task.description]
            assert [(task.completed, task.total, task.visible) for task in tasks] == [(4, 4, False)] * shown


def test_bad_arguments_and_models() -> None:
    for options in ({"num_batches": 0}, {"every_n_epochs": 0}, {"num_batches": 1.5}):
        (name, value), = options.items()  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
            PreciseBatchNorm(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forward='nope' must name a method, and Net has none of it"):
        fit(Net(), PreciseBatchNorm(forward="nope"))
    with pytest.raises(ValueError, match="averaged_model='emma', and 'Net' object has no attribute 'emma'"):
        fit(Net(), PreciseBatchNorm(averaged_model="emma"))
    with pytest.raises(TypeError, match="averaged_model must lead to a module, got NoneType"):
        fit(Net(), PreciseBatchNorm(averaged_model="ema"))
    with pytest.raises(ValueError, match="first tensor of a batch, and Training has no forward"):
        fit(Training(), PreciseBatchNorm(), num_sanity_val_steps=0)
    without = Net()
    without.net[1] = without.net[5] = nn.Identity()
    with pytest.warns(UserWarning, match="PreciseBatchNorm has no effect: recalibrate needs a model with batch norms"):
        fit(without, PreciseBatchNorm())
    callback = PreciseBatchNorm()
    callbacks = (ModelCheckpoint(every_n_train_steps=3, save_weights_only=True), callback)
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, devices=1, strategy="auto")
    with pytest.warns(UserWarning, match="is not told of checkpoints with save_weights_only=True"):
        callback.on_train_start(trainer, Net())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the next jsonargparse has another name for it
def test_from_a_configuration_file() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    init = {"num_batches": 7, "averaged_model": "ema.copy", "forward": "logits"}
    parsed = parser.parse_object({"callback": {"class_path": "syncnorm.PreciseBatchNorm", "init_args": init}})
    made = parser.instantiate_classes(parsed).callback
    assert (made.num_batches, made.averaged_model, made.forward, made.every_n_epochs) == (7, "ema.copy", "logits", 1)
    assert made.state_dict() == {}
