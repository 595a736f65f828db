"""Tier: no process. NormMonitor: what it logs and when, that training does not notice, and its picture.

Over ranks it is tested in test_lightning_ranks.py, which has Lightning loaded there.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm
from syncnorm import NormMonitor
from syncnorm.diagnostics._heat_map import heat_map
from syncnorm.distributed import observers
from syncnorm.lightning import _norm_monitor
from tests.lightning_training import make_trainer


@pytest.fixture(autouse=True)
def _pictures_go_to_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data() -> TensorDataset:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return TensorDataset(x, (x.sum(1) > 3).long())


class Net(LightningModule):
    """Its first norm sees the data themselves, and its running statistics stay 0 and 1."""

    fail_at = -1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("the training step fails")
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Spy(Callback):
    """How many hooks are on the norms in each batch, and what is logged after it."""

    def __init__(self) -> None:
        self.hooks: list[int] = []
        self.gaps: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules()))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.gaps.append(float(trainer.callback_metrics.get("sn/gap_max", torch.nan)))


class Board(Logger):
    """A logger with figures, as TensorBoard's."""

    name, version, save_dir = "board", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.figures: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append((tag, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, {key: value for key, value in metrics.items() if key.startswith("sn/")}))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def fit(model: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Any:
    defaults = {"devices": 1, "strategy": "auto", "max_epochs": 2, "log_every_n_steps": 7}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not been set for this class|.*find_unused|Starting from v|.*logger=True")
        trainer = make_trainer(callbacks=callbacks, **{**defaults, **options})
        trainer.fit(model, DataLoader(data(), 6), ckpt_path=ckpt_path)
    return trainer


def gap_of(x: Tensor) -> float:
    """Largest over channels, with running statistics 0 and 1, sample by sample."""
    x = x.double().numpy()
    trained, evaluated = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), x / np.sqrt(1 + 1e-5)
    return float(np.sqrt(((trained - evaluated) ** 2).mean(0)).max())


def test_every_n_steps_the_batch_of_that_step_is_logged() -> None:
    model, spy, board = Net(), Spy(), Board()
    fit(model, NormMonitor(every_n_steps=3), spy, logger=board)
    logged = [(step, values) for step, values in board.logged if values]
    assert [step for step, _ in logged] == [2, 5, 8, 11, 14]  # counted from 0, as Lightning's own
    assert set(logged[0][1]) == {"sn/gap", "sn/gap_max", "sn/batch", "sn/dead", "sn/saturated"}
    assert logged[0][1]["sn/batch"] == 6
    batches = [x for x, _ in DataLoader(data(), 6)]
    for step, values in logged:
        if values["sn/gap_max"] == pytest.approx(gap_of(batches[step % 8]), rel=1e-5):
            continue  # the other norm may be worse
        assert values["sn/gap_max"] > gap_of(batches[step % 8])
    assert spy.hooks == [4 if step % 3 == 2 else 0 for step in range(16)], "two norms, before and after, at a look only"
    assert not np.isnan(spy.gaps[2:]).any() and len(set(spy.gaps[2:5])) == 1, "callback_metrics keeps the last look"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not observers._observers


def test_only_chosen_layers_and_their_exact_gap() -> None:
    board = Board()
    fit(Net(), NormMonitor(4, include=["net.0"]), NormMonitor(8, exclude=["net.0"], heat_map=False), logger=board)
    first = [values["sn/gap_max"] for step, values in board.logged if values and step in (3, 11)]
    exact = gap_of(data().tensors[0][18:24])
    assert first == [pytest.approx(exact, rel=1e-5)] * 2
    assert board.figures == [("sn/norms", 16)]


def test_training_does_not_notice() -> None:
    with_it, without = Net(), Net()
    torch.manual_seed(1)
    fit(without)
    torch.manual_seed(1)
    fit(with_it, NormMonitor(1))
    assert all(
        torch.equal(a, b) for a, b in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True)
    )


def test_micro_batches_are_looked_at_once_a_step() -> None:
    spy = Spy()
    fit(Net(), NormMonitor(2), spy, accumulate_grad_batches=2)
    assert [at for at, hooks in enumerate(spy.hooks) if hooks] == [2, 6, 10, 14]


def test_after_an_exception_nothing_is_left() -> None:
    model = Net()
    model.fail_at = 2
    with pytest.raises(RuntimeError, match="the training step fails"):
        fit(model, NormMonitor(3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not observers._observers
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_renorm_is_watched_and_a_compiled_model() -> None:
    board, model = Board(), Net()
    fit(torch.compile(model, backend="eager"), syncnorm.SyncNorm(to="batch_renorm"), NormMonitor(4), logger=board)
    keys = [set(values) for _, values in board.logged if values]
    assert len(keys) == 4 and all({"sn/clip_r", "sn/clip_d", "sn/gap"} <= found for found in keys)


def test_a_resumed_run_goes_on_with_its_picture(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "half")
    fit(Net(), NormMonitor(3), keep, max_epochs=1, enable_checkpointing=True)
    again, whole = NormMonitor(3), NormMonitor(3)
    fit(Net(), again, ckpt_path=tmp_path / "half.ckpt")
    fit(Net(), whole)
    assert again.state_dict()["steps"] == whole.state_dict()["steps"] == [3, 6, 9, 12, 15]
    assert again.state_dict()["layers"] == ["net.0", "net.2"]
    assert again.state_dict()["history"]["gap"].shape == (5, 2)
    torch.save(again.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


def test_long_runs_keep_every_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_norm_monitor, "_MOST_LOOKS", 8)
    monitor = NormMonitor(1)
    fit(Net(), monitor)
    assert monitor.state_dict()["steps"] == [4, 8, 11, 13, 15, 16]
    assert monitor.state_dict()["history"]["noise"].shape == (6, 2)


def test_the_picture_goes_where_the_logs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, csv = Board(), CSVLogger(tmp_path / "csv")
    fit(Net(), NormMonitor(4), logger=[board, csv], default_root_dir=tmp_path / "root")
    assert board.figures == [("sn/norms", 16)]
    assert (Path(csv.log_dir) / "sn_norms.png").read_bytes().startswith(b"\x89PNG")
    assert "sn/gap_max" in (Path(csv.log_dir) / "metrics.csv").read_text()
    assert not (tmp_path / "root").exists()
    fit(Net(), NormMonitor(4), default_root_dir=tmp_path / "root")
    assert (tmp_path / "root" / "sn_norms.png").exists()
    fit(Net(), NormMonitor(4, heat_map=False), default_root_dir=tmp_path / "none")
    monkeypatch.setattr(_norm_monitor, "find_spec", lambda _: None)
    with pytest.warns(UserWarning, match="NormMonitor draws no heat map: pip install matplotlib"):
        fit(Net(), NormMonitor(4), default_root_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_tensorboard_reads_numbers_and_picture_back(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    board, logger = Board(), TensorBoardLogger(tmp_path)
    fit(Net(), NormMonitor(3), logger=[logger, board])
    events = accumulators.EventAccumulator(logger.log_dir).Reload()
    for key in ("sn/gap", "sn/gap_max", "sn/batch", "sn/dead", "sn/saturated"):
        exact = [(step, pytest.approx(values[key])) for step, values in board.logged if values]
        assert [(event.step, event.value) for event in events.Scalars(key)] == exact
    (image,) = events.Images("sn/norms")
    assert image.step == 15 and image.width > 100 < image.height
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_every_panel_is_labelled_with_its_unit() -> None:
    values = {"gap": torch.rand(3, 60), "noise": torch.full((3, 60), torch.nan), "drift": torch.rand(3, 60).round()}
    figure = heat_map(values, [f"a.very.long.name.of.a.layer.number.{i}" for i in range(60)], [50, 100, 150])
    panels, bars = figure.axes[:2], figure.axes[2:]
    assert [panel.get_xlabel() for panel in panels] == ["training step"] * 2
    assert panels[0].get_ylabel() == "layer (one in 2 is named)" and len(panels[0].get_yticklabels()) == 30
    assert [bar.get_ylabel() for bar in bars] == ["gap (σ)", "drift (σ)"], "what is not known has no panel"
    assert {mesh.get_cmap().name for panel in panels for mesh in panel.collections} == {"viridis"}
    assert heat_map({"gap": torch.zeros(2, 3)}, ["a", "b", "c"], [1, 2]) is None
    assert heat_map({"gap": torch.ones(1, 1)}, ["a"], [1]) is not None


def test_bad_arguments_and_models() -> None:
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"every_n_steps must be a whole number of at least 1, got {every}"):
            NormMonitor(every)  # type: ignore[arg-type]
    without = Net()
    without.net[0] = without.net[2] = nn.Identity()
    with pytest.warns(UserWarning, match="NormMonitor has no effect: there is no batch norm to look at"):
        fit(without, NormMonitor(1))
    with pytest.raises(ValueError, match=r"net\.9"):
        fit(Net(), NormMonitor(1, include=["net.9"]))
    with pytest.raises(ValueError, match=r"exclude='net\.9'"):
        fit(Net(), NormMonitor(1, include="net.*", exclude="net.9"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the next jsonargparse has another name for it
def test_from_a_configuration_file() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    init = {"every_n_steps": 7, "exclude": ["head.*"]}
    parsed = parser.parse_object({"callback": {"class_path": "syncnorm.NormMonitor", "init_args": init}})
    made = parser.instantiate_classes(parsed).callback
    assert (made.every_n_steps, made.include, made.exclude, made.heat_map) == (7, [], ["head.*"], True)
