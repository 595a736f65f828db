"""Tier: gloo ranks. SyncNorm and its plugin on two ranks under DDP, beside whatever else a Trainer may hold.

All cases run in one launch of two ranks, since importing Lightning takes longer than all of them together.
"""

import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

import syncnorm
from syncnorm import SyncNorm, SyncNormPlugin
from syncnorm.lightning import _sync_norm
from syncnorm.testing import count_collectives, run_ranks
from tests import test_norm_metrics
from tests.lightning_training import (
    FEW,
    GLOBAL_BATCH,
    TOLERANCE,
    LateTraining,
    OldTraining,
    Training,
    by_hand,
    dataset,
    distance,
    fields,
    fit,
    kinds,
    lost,
    make_trainer,
    network,
    norms,
)

pytestmark = pytest.mark.gloo

LOCAL, SYNCED = ["BatchNorm2d", "BatchNorm1d"], ["SyncBatchNorm2d", "SyncBatchNorm1d"]


class FrozenStart(BaseFinetuning):
    """The convolution and its norm stay frozen; from the second epoch on the norm follows its statistics again."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:3], train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        for layer in norms(pl_module.net[:3]) if epoch == 1 else []:
            layer.track_running_stats = True  # type: ignore[assignment]


class WithoutNorm(Training):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = self.net[5] = torch.nn.Identity()


def fp16(precision: str, *callbacks: Any) -> Any:
    """Mixed, it is asked for by plugin: Lightning takes bfloat16 on CPU. The scale is one with which no step is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    mixed: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    options = mixed if precision == "16-mixed" else {"precision": precision}
    return fit(Training(torch.float32), *callbacks, max_steps=FEW, **options)


def swa() -> Any:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


def compiled() -> Any:
    return torch.compile(Training(), backend="aot_eager")


def message(*callbacks: Any, module: Any = None, **options: Any) -> tuple[str, list[str]]:
    """What a fit raises, and the classes after it."""
    module = Training() if module is None else module
    try:
        fit(module, *callbacks, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}", kinds(module)
    return "nothing", kinds(module)


def exception_then_fit(folder: Path) -> Any:
    callback, module = SyncNorm(), Training()
    before = fields(module)
    module.fail_at_step = 2
    raised, after = message(callback, module=module)
    unchanged = fields(module) == before
    module.load_state_dict(Training().state_dict())
    module.fail_at_step = None
    return {"raised": raised, "after_exception": after, "unchanged": unchanged} | fit(module, callback)


def every_stage(folder: Path) -> Any:
    callback, module = SyncNorm(), Training()
    before = fields(module)
    trainer = make_trainer(callbacks=(callback,), limit_val_batches=2)
    seen = []
    for stage in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        stage(module)
        seen.append((kinds(module), fields(module) == before))
    module.load_state_dict(Training().state_dict())
    return {"seen": seen} | fit(module, callback)


def resume(folder: Path) -> Any:
    torch.manual_seed(0)
    whole = fit(Training(), SyncNorm(), max_epochs=4)
    keep = ModelCheckpoint(dirpath=folder, filename="half")
    fit(Training(), SyncNorm(), keep, max_epochs=2, enable_checkpointing=True)
    path = folder / "half.ckpt"
    again = fit(Training(), SyncNorm(), max_epochs=4, ckpt_path=str(path))
    checkpoint = torch.load(path, weights_only=True)
    Training().load_state_dict(checkpoint["state_dict"])  # strictly, into batch norm
    return {
        "whole": whole["state"],
        "state": again["state"],
        "entry": checkpoint["syncnorm"],
        "callbacks": checkpoint["callbacks"],
    }


def group_norm(folder: Path) -> Any:
    keep = ModelCheckpoint(dirpath=folder, filename="group")
    callback, module = SyncNorm(to="group_norm", num_groups=2), Training()
    run = fit(module, callback, keep, enable_checkpointing=True)
    path, fresh = str(folder / "group.ckpt"), Training()
    make_trainer(callbacks=(SyncNorm(to="group_norm", num_groups=2),), limit_val_batches=2).validate(
        fresh, ckpt_path=path
    )
    same = all(torch.equal(value, fresh.state_dict()[name]) for name, value in module.state_dict().items())
    wrong = message(SyncNorm(to="group_norm", num_groups=3), ckpt_path=path, max_epochs=2)[0]
    late = message(SyncNorm(to="group_norm"), module=LateTraining())[0]
    inside = fit(LateTraining(lambda module: syncnorm.convert(module, to="group_norm", num_groups=2)), callback)
    return run | {"fresh": kinds(fresh), "same": same, "wrong": wrong, "late": late, "inside": inside["state"]}


def side_by_side(folder: Path) -> Any:
    both = fit(Training(), SyncNorm(include=["net.1"]), SyncNorm(include=["net.5"]))
    return both | {"rivals": message(SyncNorm(include=["net.*"]), SyncNorm(exclude=["net.5"]))}


def settings_of_before(folder: Path) -> Any:
    """A layer that its author synchronised over groups of one; the callback wants the world for the time of the fit."""
    module = Training()
    syncnorm.convert(module, process_group=1, include="net.1")
    run = fit(module, SyncNorm(process_group="world"))
    return run | {"group": module.net[1].process_group, "alone": fit(module, SyncNorm())["after"]}


def own_groups(folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(Training(), SyncNorm(process_group=1))
        node = fit(Training(), SyncNorm(process_group="node"))
    return run | {
        "warned": [str(w.message) for w in caught],
        "node": node["state"],
        "odd": message(SyncNorm(process_group=3)),
    }


def micro_batches(folder: Path) -> Any:
    options = {"accumulate_grad_batches": 2}
    run = fit(Training(), SyncNorm(accumulate=2), **options)
    averaged = fit(Training(), SyncNorm(accumulate=2), EMAWeightAveraging(decay=0.9), **options)
    copied = [
        message(EMAWeightAveraging(decay=0.9), SyncNorm(accumulate=2), **options),
        message(EMAWeightAveraging(decay=0.9), SyncNorm(to="batch_renorm")),
    ]
    plain = fit(Training(), SyncNorm(), **options)
    return run | {"averaged": averaged["after"], "copied": copied, "plain": plain["state"]}


class Drifting(Callback):
    """From its 6th batch on, one rank's statistics go their own way; the head's norm is on nobody's list."""

    batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        pl_module.net[5].running_mean += trainer.global_rank
        if self.batches >= 6:
            pl_module.net[1].running_mean[2] += trainer.global_rank


def audited(folder: Path) -> Any:
    drifting = Drifting()
    with mock.patch.object(_sync_norm, "audit", wraps=_sync_norm.audit) as audits:
        run = fit(Training(), SyncNorm(audit_every_n_steps=3), accumulate_grad_batches=2)
    text, after = message(drifting, SyncNorm(include=["net.1"], audit_every_n_steps=4))
    return run | {"audits": audits.call_count, "text": text, "batches": drifting.batches, "restored": after}


def precise(folder: Path) -> Any:
    return fit(Training(), SyncNorm(), syncnorm.PreciseBatchNorm(forward=lambda model, batch: model.net(batch[0])))


class Logged(Callback):
    """What a NormMonitor before it has logged last."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = trainer.callback_metrics.items()
        self.values = {key: float(value) for key, value in found if key.startswith("sn/")}


def monitored(folder: Path) -> Any:
    runs = {}
    for name, callbacks in (("local", ()), ("synced", (SyncNorm(),))):
        logged = Logged()
        with count_collectives() as counts:
            monitor = syncnorm.NormMonitor(4, heat_map=name == "local")
            run = fit(Training(), *callbacks, monitor, logged, default_root_dir=folder / str(dist.get_rank()))
        runs[name] = run | {"logged": logged.values, "gathers": counts["all_gather"]}
    runs["compiled"] = fit(compiled(), SyncNorm(), syncnorm.NormMonitor(4, heat_map=False))
    runs["drawn"] = (folder / str(dist.get_rank()) / "sn_norms.png").exists()
    return runs


def nothing_to_do(folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = SyncNorm()
        fit(WithoutNorm(), callback, max_steps=1)
        fit(WithoutNorm(), callback, max_steps=1)
        fit(WithoutNorm(), plugins=[SyncNormPlugin()], max_steps=1)
    return {"warned": [str(w.message) for w in caught if "SyncNorm" in str(w.message)]}


CASES = {
    "without": lambda folder: fit(Training()),
    "callback": lambda folder: fit(Training(), SyncNorm()),
    "plugin": lambda folder: fit(Training(), plugins=[SyncNormPlugin()]),
    "callback and plugin": lambda folder: fit(Training(), SyncNorm(), plugins=[SyncNormPlugin()]),
    "kept": lambda folder: fit(Training(), SyncNorm(revert=False)),
    "late": lambda folder: fit(LateTraining(), SyncNorm()),
    "late, plugin": lambda folder: fit(LateTraining(), plugins=[SyncNormPlugin()]),
    "late, by name": lambda folder: fit(LateTraining(), SyncNorm(include=["net.*"])),
    "late, without": lambda folder: fit(LateTraining()),
    "pytorch_lightning, callback": lambda folder: fit(OldTraining(), SyncNorm()),
    "pytorch_lightning, plugin": lambda folder: fit(OldTraining(), plugins=[SyncNormPlugin()]),
    "pytorch_lightning, without": lambda folder: fit(OldTraining()),
    "compiled": lambda folder: fit(compiled(), SyncNorm()),
    "swa": lambda folder: fit(Training(), SyncNorm(), swa(), max_epochs=2),
    "swa first": lambda folder: fit(Training(), swa(), SyncNorm(), max_epochs=2),
    "ema": lambda folder: fit(Training(), SyncNorm(), EMAWeightAveraging(decay=0.9)),
    "ema first": lambda folder: fit(Training(), EMAWeightAveraging(decay=0.9), SyncNorm()),
    "finetuning": lambda folder: fit(Training(), SyncNorm(), FrozenStart(), max_epochs=2),
    "bf16-true": lambda folder: fit(Training(torch.float32), SyncNorm(), precision="bf16-true", max_steps=1),
    "bf16-true, late": lambda folder: fit(LateTraining(), SyncNorm(), precision="bf16-true", max_steps=1),
    "bf16-mixed": lambda folder: fit(Training(torch.float32), SyncNorm(), precision="bf16-mixed", max_steps=1),
    "16-mixed": lambda folder: fp16("16-mixed", SyncNorm()),
    "16-mixed, without": lambda folder: fp16("16-mixed"),
    "16-true": lambda folder: fp16("16-true", SyncNorm()),
    "16-true, without": lambda folder: fp16("16-true"),
    "sync_batchnorm": lambda folder: message(SyncNorm(), sync_batchnorm=True),
    "exception": exception_then_fit,
    "every stage": every_stage,
    "resume": resume,
    "monitored": monitored,
    "metrics": lambda folder: test_norm_metrics.all_on_ranks(),
    "group norm": group_norm,
    "side by side": side_by_side,
    "settings of before": settings_of_before,
    "own groups": own_groups,
    "micro-batches": micro_batches,
    "nothing to do": nothing_to_do,
    "audited": audited,
    "precise": precise,
}
ORACLES = {
    "swa": lambda: fit(Training(), swa(), max_epochs=2, devices=1, strategy="auto"),
    "ema": lambda: fit(Training(), EMAWeightAveraging(decay=0.9), devices=1, strategy="auto"),
    "finetuning": lambda: fit(Training(), FrozenStart(), max_epochs=2, devices=1, strategy="auto"),
}


def run_cases(names: list[str], folder: str) -> dict[str, Any]:
    outcomes: dict[str, Any] = {}
    for name in names:
        place = Path(folder) / name.replace(" ", "-")
        try:
            outcomes[name] = CASES[name](place)  # type: ignore[no-untyped-call]
        except BaseException:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_cases, 2, list(CASES), str(tmp_path_factory.mktemp("ranks")), timeout=110)


@pytest.fixture
def case(ranks: list[dict[str, Any]]) -> Any:
    def outcome(name: str) -> dict[str, Any]:
        for rank, outcomes in enumerate(ranks):
            assert not isinstance(outcomes[name], str), f"rank {rank}: {outcomes[name]}"
        if isinstance(ranks[0][name], dict) and "state" in ranks[0][name]:
            one, other = (outcomes[name]["state"] for outcomes in ranks)
            assert distance(one, other) == 0 or "without" in name or name == "own groups", "the ranks differ"
        return ranks[0][name]

    return outcome


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, torch.Tensor]:
    return by_hand()


@pytest.mark.parametrize(
    "name",
    [
        "callback",
        "plugin",
        "callback and plugin",
        "late",
        "late, plugin",
        "late, by name",
        "pytorch_lightning, callback",
        "pytorch_lightning, plugin",
        "compiled",
        "exception",
        "every stage",
    ],
)
def test_two_ranks_equal_one_process(case: Any, whole_batch: Any, name: str) -> None:
    run = case(name)
    assert run["during"] == SYNCED
    assert run["after"] == LOCAL
    assert distance(run["state"], whole_batch) < TOLERANCE


@pytest.mark.parametrize("name", ["without", "late, without", "pytorch_lightning, without"])
def test_without_it_the_same_comparison_fails(case: Any, whole_batch: Any, name: str) -> None:
    run = case(name)
    assert run["during"] == LOCAL
    assert distance(run["state"], whole_batch) > 1e-3


def test_revert_false_keeps_the_layers(case: Any) -> None:
    assert case("kept")["after"] == SYNCED


@pytest.mark.parametrize("name", ["swa", "swa first", "ema", "ema first", "finetuning"])
def test_beside_other_callbacks(case: Any, name: str) -> None:
    alone = ORACLES[name.removesuffix(" first")]()
    assert case(name)["during"] == SYNCED
    assert distance(case(name)["state"], alone["state"]) < TOLERANCE


def test_an_exception_gives_back_and_the_next_fit_works(case: Any) -> None:
    run = case("exception")
    assert "the training step fails" in run["raised"]
    assert run["after_exception"] == LOCAL
    assert run["unchanged"]


def test_precise_statistics_are_those_of_one_process_with_whole_batches(case: Any, whole_batch: Any) -> None:
    alone = network()
    alone.load_state_dict({name.removeprefix("net."): value for name, value in whole_batch.items()})
    syncnorm.recalibrate(alone, DataLoader(dataset(), GLOBAL_BATCH))
    state = {f"net.{name}": value for name, value in alone.state_dict().items()}
    assert distance(case("precise")["state"], state) < TOLERANCE
    assert distance(whole_batch, state) > 1e-3


def test_stages_leave_no_residue(case: Any) -> None:
    assert case("every stage")["seen"] == [(LOCAL, True)] * 4


def test_a_resumed_run_equals_an_uninterrupted_one(case: Any) -> None:
    run = case("resume")
    assert distance(run["state"], run["whole"]) == 0
    assert distance(run["state"], by_hand(4)) < 100 * TOLERANCE  # 48 steps
    spec = {"to": "sync_batch_norm", "include": [], "exclude": []}
    assert run["entry"] == {"version": 1, "specs": [spec]}
    assert run["callbacks"]["SyncNorm"] == {"version": 1, "spec": spec}


@pytest.mark.parametrize("name", ["bf16-true", "bf16-true, late", "bf16-mixed"])
def test_statistics_stay_float32_under_bf16(case: Any, name: str) -> None:
    run, exact = case(name), by_hand(steps=1)
    assert run["during"] == SYNCED
    assert set(run["dtypes"]) == {torch.float32}
    assert run["state"]["net.0.weight"].dtype == (torch.bfloat16 if "true" in name else torch.float32)
    # The convolution rounds to 8 bits, its input too: 2^-8 each, on values of about 2 with momentum 0.1.
    gap = (run["state"]["net.1.running_mean"].double() - exact["net.1.running_mean"]).abs().max()
    assert gap < 2 * 2 * 2**-8 * 0.1


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_fp16_loses_what_it_loses_in_one_process(case: Any, precision: str) -> None:
    assert set(case(precision)["dtypes"]) == {torch.float32}
    assert lost(case(precision)["state"], precision) < 2
    assert lost(case(f"{precision}, without")["state"], precision) > 20


def test_drift_is_found_at_the_next_audit(case: Any) -> None:
    run = case("audited")
    assert run["audits"] == 2  # 12 batches are 6 steps, audited every 3
    # Batch 6 drifts; step 8 is the first multiple of 4 after it. DDP broadcasts buffers before each forward: what is
    # found is the drift of batch 8 alone.
    assert "SyncNormMismatch" in run["text"]
    assert "First net.1.running_mean, channel 2: ranks [0] have " in run["text"]
    assert "(largest difference 1)" in run["text"]
    assert run["batches"] == 8
    assert run["restored"] == LOCAL


def test_norms_are_monitored_over_ranks_and_training_does_not_notice(case: Any, whole_batch: Any, ranks: Any) -> None:
    runs = case("monitored")
    local, synced = runs["local"], runs["synced"]
    assert distance(local["state"], case("without")["state"]) == 0
    assert distance(synced["state"], whole_batch) < TOLERANCE
    assert distance(runs["compiled"]["state"], whole_batch) < TOLERANCE
    assert local["logged"]["sn/drift"] > 1e-3 > synced["logged"]["sn/drift"] == 0
    # The head's norm has the smallest batch: 2 samples a rank, 4 together.
    assert (local["logged"]["sn/batch"], synced["logged"]["sn/batch"]) == (2, 4)
    assert (local["logged"]["sn/exchanges"], synced["logged"]["sn/exchanges"]) == (0, 4)
    assert 0 < synced["logged"]["sn/noise"] < 1
    assert local["gathers"] == synced["gathers"] == 3  # looks in 12 steps
    others = ranks[1]["monitored"]
    for name in ("local", "synced"):
        assert others[name]["logged"] == runs[name]["logged"], "every rank has the same numbers"
    assert runs["drawn"] and not others["drawn"]


def test_metrics_of_norms_are_merged_exactly(case: Any, ranks: Any) -> None:
    case("metrics")
    test_norm_metrics.assert_merged_exactly([outcomes["metrics"] for outcomes in ranks])


def test_sync_batchnorm_beside_it_is_refused(case: Any) -> None:
    text, after = case("sync_batchnorm")
    assert text == (
        "SyncNormError: SyncNorm: Trainer(sync_batchnorm=True) would replace these layers by torch SyncBatchNorm (GPU only). "
        "Remove sync_batchnorm=True."
    )
    assert after == LOCAL


def test_group_norm_is_fitted_saved_and_evaluated(case: Any) -> None:
    run = case("group norm")
    assert run["during"] == run["after"] == run["fresh"] == ["GroupNorm", "GroupNorm"]
    assert run["same"]
    assert distance(run["inside"], run["state"]) == 0  # converted in configure_model
    assert "num_groups=2, and this run has to='group_norm' and num_groups=3" in run["wrong"]
    assert "2 batch norms (net.1, net.5) were made after Callback.setup" in run["late"]
    assert "Call syncnorm.convert(self, to='group_norm') in configure_model" in run["late"]


def test_callbacks_on_different_layers(case: Any, whole_batch: Any) -> None:
    run = case("side by side")
    assert run["after"] == LOCAL
    assert distance(run["state"], whole_batch) < TOLERANCE
    text, after = run["rivals"]
    assert "two SyncNorm callbacks select the same 1 layers: net.1" in text
    assert after == LOCAL


def test_layers_that_were_synchronised_before_stay_so(case: Any, whole_batch: Any) -> None:
    run = case("settings of before")
    assert run["during"] == SYNCED
    assert run["after"] == run["alone"] == ["SyncBatchNorm2d", "BatchNorm1d"]
    assert run["group"] == 1
    assert distance(run["state"], whole_batch) < TOLERANCE


def test_groups(case: Any, whole_batch: Any) -> None:
    run = case("own groups")
    assert distance(run["state"], case("without")["state"]) == 0  # each rank alone
    assert any(
        "has no effect: process_group=1 gives each of the 2 ranks a group of its own" in w for w in run["warned"]
    )
    assert distance(run["node"], whole_batch) < TOLERANCE
    text, after = run["odd"]
    assert "process_group=3 must divide the number of ranks, which is 2" in text
    assert after == LOCAL


def test_micro_batches(case: Any) -> None:
    run = case("micro-batches")
    assert run["state"]["net.1.num_batches_tracked"] == 6
    assert run["plain"]["net.1.num_batches_tracked"] == 12
    parameters = [name for name in run["state"] if name.endswith(("weight", "bias"))]  # whose training is the same
    assert distance(*({name: state[name] for name in parameters} for state in (run["state"], run["plain"]))) == 0
    assert run["averaged"] == LOCAL
    for text, after in run["copied"]:
        assert "adds buffers to layers that EMAWeightAveraging has copied already. Put SyncNorm before it" in text
        assert after == LOCAL


def test_no_effect_is_said_once(case: Any) -> None:
    callback, plugin = case("nothing to do")["warned"]
    assert callback.startswith("SyncNorm found no batch norm to convert")
    assert plugin.startswith("SyncNormPlugin found no batch norm to convert")
