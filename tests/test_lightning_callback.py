"""Tier: no process. The contract of SyncNorm and SyncNormPlugin that one device can show, and their refusals."""

import copy
import pickle
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import pytest
import pytorch_lightning as pl_old
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import syncnorm
from syncnorm import SyncNorm, SyncNormError, SyncNormPlugin
from syncnorm.conversion import To
from syncnorm.lightning import DigitsDataModule, DigitsMLP, _flavours, _sync_norm
from tests.lightning_training import Training, by_hand, distance, fields, fit, kinds, make_trainer

LOCAL, SYNCED = ["BatchNorm2d", "BatchNorm1d"], ["SyncBatchNorm2d", "SyncBatchNorm1d"]
TARGETS = list(get_args(To))


class OddNorm(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


class OddTraining(Training):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = OddNorm(6).double()


def alone(module: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
    return fit(module, *callbacks, devices=1, strategy="auto", **options)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(_sync_norm, "rank_zero_info", lines.append)
    return lines


def test_both_lightnings_accept_it() -> None:
    for package in (pl, pl_old):
        assert isinstance(SyncNorm(), package.Callback)
        assert isinstance(SyncNormPlugin(), package.plugins.LayerSync)


def test_one_device_is_plain_batch_norm_bit_for_bit(said: list[str]) -> None:
    run = alone(Training(), SyncNorm())
    assert run["during"] == SYNCED
    assert run["after"] == LOCAL
    assert distance(run["state"], alone(Training())["state"]) == 0
    assert distance(run["state"], by_hand()) < 1e-12  # Lightning's loop and ours differ in nothing but order of hooks
    assert said == [
        "SyncNorm: 1 BatchNorm2d -> SyncBatchNorm2d, 1 BatchNorm1d -> SyncBatchNorm1d (1 rank: plain batch norm until there "
        "are more); 0 skipped"
    ]


def test_only_plain_batch_norm_is_said_to_be_that(said: list[str]) -> None:
    alone(Training(), SyncNorm("batch_renorm"))
    assert said == ["SyncNorm: 1 BatchNorm2d -> BatchRenorm2d, 1 BatchNorm1d -> BatchRenorm1d (1 rank); 0 skipped"]


@pytest.mark.parametrize("to", ["group_norm", "layer_norm", "instance_norm"])
def test_other_targets_stay_after_the_fit(to: Any, said: list[str]) -> None:
    module = Training()
    options = {"num_groups": 2} if to == "group_norm" else {}
    options["exclude"] = ["net.5"] if to == "instance_norm" else []  # features have no space to normalise over
    run = alone(module, SyncNorm(to=to, **options))
    assert run["after"] == run["during"] != LOCAL
    assert run["after"][0] == {"instance_norm": "InstanceNorm2d"}.get(to, "GroupNorm")
    assert said[0].startswith(f"SyncNorm: 1 BatchNorm2d -> {run['after'][0]}")
    assert said[0].endswith("; 0 skipped")
    stays = SyncNorm(to=to, **options)
    make_trainer(callbacks=(stays,), devices=1, strategy="auto", limit_val_batches=1).validate(module)
    assert kinds(module) == run["after"]
    assert len(said) == 1


def test_convolutions_of_a_family_come_back_too() -> None:
    module = Training()
    surgery = SyncNorm("moving_average_batch_norm", options={"weight_centralization": True})._surgery
    types = [type(layer) for layer in module.modules()]
    surgery.run(module, last=True)
    assert surgery.summary().startswith(
        "1 BatchNorm2d -> MovingAverageBatchNorm2d, 1 BatchNorm1d -> MovingAverageBatchNorm1d"
    )
    assert "1 Conv2d -> WeightCentralizedConv2d" in surgery.summary()
    surgery.undo()
    assert [type(layer) for layer in module.modules()] == types


@pytest.mark.parametrize("run", [{"options": {"on_nonfinite": "raise"}}, {"to": "batch_renorm"}])
def test_settings_of_a_layer_that_was_synchronised_before_come_back(run: dict[str, Any]) -> None:
    module = Training()
    syncnorm.convert(module, include="net.1", on_nonfinite="skip_update")
    module.net[1].memory_efficient = True
    before = {name: value for name, value in vars(module.net[1]).items() if name[0] != "_"}
    surgery = SyncNorm(**run)._surgery
    surgery.run(module, last=True)
    assert module.net[1].on_nonfinite != "skip_update"
    surgery.undo()
    assert {name: value for name, value in vars(module.net[1]).items() if name[0] != "_"} == before
    assert type(module.net[1]) is syncnorm.SyncBatchNorm2d and type(module.net[5]) is nn.BatchNorm1d


def test_patterns(said: list[str]) -> None:
    assert alone(Training(), SyncNorm(include="net.1"))["during"] == ["SyncBatchNorm2d", "BatchNorm1d"]
    assert alone(Training(), SyncNorm(exclude=["*.1"]))["during"] == ["BatchNorm2d", "SyncBatchNorm1d"]
    module = Training()
    with pytest.raises(ValueError, match=r"include='nett\.\*' matches no normalisation layer"):
        alone(module, SyncNorm(include=["nett.*"]))
    assert kinds(module) == LOCAL


def test_a_subclass_is_left_with_a_warning_or_refused() -> None:
    with pytest.warns(UserWarning, match="OddNorm may do more than batch norm"):
        run = alone(OddTraining(), SyncNorm())
    assert run["during"] == ["OddNorm", "SyncBatchNorm1d"]
    module = OddTraining()
    before = fields(module)
    with pytest.raises(SyncNormError, match="strict=True, and 1 layers cannot be converted"):
        alone(module, SyncNorm(strict=True))
    assert fields(module) == before


def test_two_callbacks_alike_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `SyncNorm`"):
        make_trainer(callbacks=(SyncNorm(), SyncNorm()), devices=1)
    make_trainer(callbacks=(SyncNorm(include=["net.1"]), SyncNorm(include=["net.5"])), devices=1)


def test_another_architecture_cannot_share_a_layer() -> None:
    with pytest.raises(SyncNormError, match=r"two SyncNorm callbacks select the same 2 layers: net\.1, net\.5"):
        alone(Training(), SyncNorm(to="layer_norm"), SyncNorm(include=["net.*"]))


def test_state_is_plain_data(tmp_path: Path) -> None:
    callback = SyncNorm(process_group="node", include=["net.*"], accumulate=2)
    spec = {"to": "sync_batch_norm", "include": ["net.*"], "exclude": [], "process_group": "node", "accumulate": 2}
    assert callback.state_dict() == {"version": 1, "spec": spec}
    keep = ModelCheckpoint(dirpath=tmp_path, filename="one")
    alone(Training(), callback, keep, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert checkpoint["syncnorm"] == {"version": 1, "specs": [spec]}
    assert checkpoint["callbacks"]["SyncNorm{'include': ['net.*'], 'exclude': []}"] == {"version": 1, "spec": spec}
    assert not any("_pending" in name for name in checkpoint["state_dict"])


@pytest.mark.parametrize("make", [SyncNorm, SyncNormPlugin])
def test_copies(make: Any) -> None:
    original = make(exclude=["net.5"], process_group=2)
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert vars(twin._surgery) == vars(original._surgery)
    module = Training()
    trainer = make_trainer(callbacks=(original,) if make is SyncNorm else (), devices=1, strategy="auto")
    trainer.fit(module)
    pickle.dumps(original)  # what ddp_spawn does with it: nothing of the run hangs on it


def test_loading_a_state() -> None:
    SyncNorm().load_state_dict(SyncNorm(process_group="node").state_dict())  # the same weights, fewer ranks
    SyncNorm(to="group_norm").load_state_dict(SyncNorm(to="group_norm", num_groups=32).state_dict())
    standardised = SyncNorm(to="group_norm", options={"weight_standardization": True})
    with pytest.raises(
        SyncNormError, match="num_groups=32 and weight_standardization=True, and this run has to='group_norm'"
    ):
        SyncNorm(to="group_norm").load_state_dict(standardised.state_dict())
    with pytest.raises(TypeError, match=r"got tlu=True\. It belongs to filter_response_norm"):
        SyncNorm(to="group_norm", options={"tlu": True})
    with pytest.raises(SyncNormError, match="a run with to='layer_norm', and this run has to='sync_batch_norm'"):
        SyncNorm().load_state_dict(SyncNorm(to="layer_norm").state_dict())
    with pytest.raises(SyncNormError, match="has version 2 of its state, and this syncnorm knows versions up to 1"):
        SyncNorm().load_state_dict({"version": 2, "spec": {}})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"to": "batch_norm"}, ValueError, f"to must be one of {TARGETS}, got 'batch_norm'"),
        ({"num_groups": 8}, TypeError, "got num_groups=8. It belongs to group_norm and evo_norm_s0."),
        ({"to": "group_norm", "accumulate": 2}, TypeError, "got accumulate=2. It belongs to sync_batch_norm."),
        ({"to": "layer_norm", "process_group": "node"}, TypeError, "got process_group='node'"),
        ({"accumulate": 0}, ValueError, "accumulate is a number of micro-batches, at least 1; got 0."),
        ({"audit_every_n_steps": 0}, ValueError, "audit_every_n_steps must be at least 1, or None for never; got 0."),
        ({"process_group": "rack"}, ValueError, '"world" or "node", got \'rack\''),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
        ({"include": [nn.BatchNorm2d]}, TypeError, "include takes globs on qualified names here"),
        (
            {"to": "group_norm", "num_groups": 8, "options": {"num_groups": 4}},
            ValueError,
            "num_groups is given by name and again in options. Give it once.",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        SyncNorm(**arguments)
    assert text in str(caught.value)


def test_options_may_hold_what_has_a_name_of_its_own() -> None:
    named, among = SyncNorm("group_norm", num_groups=4), SyncNorm("group_norm", options={"num_groups": 4})
    assert named.state_dict() == among.state_dict()


def test_the_plugin_refuses_another_architecture() -> None:
    with pytest.raises(
        ValueError, match=r"SyncNormPlugin\(to='group_norm'\) would change the architecture.* callback SyncNorm"
    ):
        SyncNormPlugin(to="group_norm")
    with pytest.raises(ValueError, match="to must be one of"):
        SyncNormPlugin(to="bogus")  # type: ignore[arg-type]


def test_an_exception_in_setup_leaves_nothing_behind() -> None:
    class Fails(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            raise RuntimeError("another callback fails")

    module = Training()
    before = fields(module)
    with pytest.raises(RuntimeError, match="another callback fails"):
        alone(module, SyncNorm(), Fails())
    assert kinds(module) == LOCAL
    assert fields(module) == before


def test_layers_reverted_during_the_fit_stay_reverted() -> None:
    class Reverts(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            syncnorm.revert(pl_module)

    assert alone(Training(), SyncNorm(), Reverts())["after"] == LOCAL


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flavours, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="neither lightning nor pytorch-lightning is installed: pip install lightning"
    ):
        _flavours._installed()


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = DigitsDataModule(batch_size=3)
    data.setup()
    assert len(data._train) == 1000
    assert len(data._held_out) == 797
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (3, 64)
    assert 0 <= images.min() <= images.max() == 1
    assert labels.dtype == torch.int64
    with pytest.raises(ValueError, match="batch_size is the number of digits per rank, at least 1; got 0"):
        DigitsDataModule(batch_size=0)
    trainer = make_trainer(devices=1, strategy="auto", limit_train_batches=300, limit_val_batches=None)
    model, data = DigitsMLP(lr=0.02), DigitsDataModule(batch_size=16)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/acc"] > 0.8
    assert trainer.test(model, data, verbose=False)[0]["test/acc"] > 0.8
    digits = torch.cat(trainer.predict(model, data))
    assert digits.shape == (797,)


def test_digits_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncnorm.testing._digits.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install syncnorm\[examples\]"):
        DigitsDataModule()
