"""Tier: no process. Conversion to synchronised layers keeps everything that a model and its friends hold on to."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import syncnorm
from syncnorm.modules import BatchNorm

PAIRS = [
    (nn.BatchNorm1d, syncnorm.SyncBatchNorm1d),
    (nn.BatchNorm2d, syncnorm.SyncBatchNorm2d),
    (nn.BatchNorm3d, syncnorm.SyncBatchNorm3d),
    (nn.SyncBatchNorm, syncnorm.SyncBatchNorm),
    (BatchNorm, syncnorm.SyncBatchNorm),
]


class Fused(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(54, 5), nn.BatchNorm1d(5)
    )


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_each_exact_type_has_its_target(source: Any, target: Any) -> None:
    model = nn.Sequential(source(4))
    layer = model[0]
    assert syncnorm.convert(model) is model
    assert model[0] is layer
    assert type(layer) is target


@pytest.mark.parametrize("source", [source for source, _ in PAIRS])
@pytest.mark.parametrize("affine", ["affine", "no affine", "no bias"])
def test_tensors_stay_the_same_objects(source: Any, affine: str) -> None:
    layer = source(4, affine=affine != "no affine", dtype=torch.float64)
    if affine == "no bias":
        layer.register_parameter("bias", None)
    layer.register_buffer("running_mean", layer.running_mean, persistent=False)
    layer.register_buffer("extra", torch.ones(2))
    layer.register_parameter("scale", nn.Parameter(torch.ones(3)))
    if layer.weight is not None:
        layer.weight.requires_grad_(False)
    before = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    keys, version = list(layer.state_dict()), layer._version
    syncnorm.convert(layer)
    after = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(layer.state_dict()) == keys
    assert "running_mean" not in keys
    assert layer._version == version
    assert layer.weight is None or not layer.weight.requires_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flags_and_attributes_stay(device: str) -> None:
    layer = nn.BatchNorm2d(4, eps=0.25, momentum=None, track_running_stats=False, device=device).eval()
    layer.qconfig = "a qconfig"  # type: ignore[assignment]
    layer.weight.tag = "no decay"  # type: ignore[attr-defined]
    model = nn.Sequential(layer, nn.BatchNorm2d(4, device=device))
    syncnorm.convert(model)
    assert (layer.eps, layer.momentum, layer.track_running_stats) == (0.25, None, False)
    assert (layer.training, model[1].training) == (False, True)
    assert layer.qconfig == "a qconfig"
    assert layer.weight.tag == "no decay"  # type: ignore[attr-defined]
    assert layer.weight.device.type == device


def test_hooks_of_all_kinds_stay_and_fire() -> None:
    layer, fired = nn.BatchNorm1d(3), []

    def note(name: str) -> Any:
        return lambda *arguments, **_: fired.append(name)

    layer.register_forward_pre_hook(note("forward_pre"))
    layer.register_forward_hook(note("forward"))
    layer.register_forward_hook(note("forward_with_kwargs"), with_kwargs=True)
    layer.register_full_backward_pre_hook(note("backward_pre"))
    layer.register_full_backward_hook(note("backward"))
    layer.register_state_dict_pre_hook(note("state_dict_pre"))
    layer.register_state_dict_post_hook(note("state_dict"))
    layer.register_load_state_dict_pre_hook(note("load_pre"))
    layer.register_load_state_dict_post_hook(note("load"))
    layer.weight.register_hook(note("weight"))
    syncnorm.convert(layer)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    layer.load_state_dict(layer.state_dict())
    expected = ["forward_pre", "forward", "forward_with_kwargs", "backward_pre", "weight", "backward"]
    assert sorted(fired) == sorted([*expected, "state_dict_pre", "state_dict", "load_pre", "load"])


def test_values_are_torchs_bit_for_bit() -> None:
    model = small_net()
    plain = copy.deepcopy(model)
    syncnorm.convert(model)
    x = torch.randn(4, 3, 5, 5)
    for mode in (True, False):
        y, exact = model.train(mode)(x), plain.train(mode)(x)
        assert torch.equal(y, exact)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_optimizers_made_before_go_on() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syncnorm.convert(model)
    before = model[1].weight.detach().clone()
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_shared_layers_stay_shared_under_every_name() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": shared, "inner": nn.ModuleList([shared, nn.BatchNorm1d(4)])})
    entries = syncnorm.plan(model).entries
    assert [(entry.name, entry.aliases) for entry in entries] == [("a", ("b", "inner.0")), ("inner.1", ())]
    syncnorm.convert(model)
    assert type(shared) is syncnorm.SyncBatchNorm1d
    assert model["a"] is model["b"] is model["inner"][0] is shared  # type: ignore[index]


def test_twice_is_once() -> None:
    model = small_net()
    syncnorm.convert(model, backend="reference", process_group=2, accumulate=3)
    pending = model[1]._pending
    again = syncnorm.plan(model)
    assert again.counts == {"swap": 0, "replace": 0, "keep": 2, "skip": 0}
    syncnorm.convert(model)
    assert (model[1].backend, model[1].process_group, model[1].accumulate) == ("reference", 2, 3)
    assert model[1]._pending is pending


def test_new_settings_reach_layers_that_are_synchronised_already() -> None:
    model = syncnorm.convert(small_net(), backend="reference", process_group=2)
    syncnorm.convert(model, process_group="node")
    assert (model[1].backend, model[1].process_group) == ("reference", "node")
    syncnorm.convert(model, backend="auto", process_group="world", accumulate=3)
    assert (model[1].backend, model[1].process_group, model[1].accumulate) == ("auto", "world", 3)
    before = model[1].running_mean.clone()
    moved = []
    for _ in range(3):
        model(torch.randn(4, 3, 5, 5))
        moved.append(not torch.equal(model[1].running_mean, before))
    assert moved == [False, False, True]


@pytest.mark.filterwarnings("error")
def test_other_norms_are_left_without_a_word() -> None:
    others = [
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LazyInstanceNorm1d(),
    ]
    model = nn.Sequential(*others, nn.BatchNorm2d(4))
    types = [type(other) for other in others]
    syncnorm.convert(model, strict=True)
    assert [type(other) for other in others] == types
    assert [entry.name for entry in syncnorm.plan(model).entries] == ["4"]


def test_a_model_without_batch_norm_is_told_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.warns(UserWarning, match="the model has no batch norm; nothing was converted"):
        assert syncnorm.convert(model) is model


def test_copies_and_pickles_of_a_converted_model() -> None:
    model = syncnorm.convert(small_net(), process_group="node")
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for made in copies:
        assert type(made[1]) is syncnorm.SyncBatchNorm2d
        assert made[1].process_group == "node"
        assert type(syncnorm.revert(made)[1]) is nn.BatchNorm2d


def test_a_compiled_model_uses_the_swapped_layers() -> None:
    model = small_net()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 3, 5, 5)
    compiled(x)
    syncnorm.convert(compiled, include="1", backend="reference")  # the name without _orig_mod
    assert type(model[1]) is syncnorm.SyncBatchNorm2d
    assert type(model[5]) is nn.BatchNorm1d
    plain = syncnorm.revert(copy.deepcopy(model))
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(model[1].running_var, plain[1].running_var)


# What is left, and said


def skipped(model: nn.Module, to: str = "sync_batch_norm") -> dict[str, str]:
    return {entry.name: entry.reason for entry in syncnorm.plan(model, to).entries if entry.action == "skip"}


def test_one_warning_names_every_layer_that_was_left() -> None:
    model = nn.ModuleDict({"a": Fused(4), "b": Fused(4), "c": nn.LazyBatchNorm2d(), "d": nn.BatchNorm2d(4)})
    with pytest.warns(UserWarning, match="left 3 as they were") as caught:
        syncnorm.convert(model)
    (text,) = [str(warning.message) for warning in caught]
    assert "2 × Fused (a, b): Fused may do more than batch norm; syncnorm.register_adapter teaches it" in text
    assert "1 × LazyBatchNorm2d (c): lazy, its channels are not known yet; run one forward pass" in text
    assert [type(layer) for layer in model.values()] == [Fused, Fused, nn.LazyBatchNorm2d, syncnorm.SyncBatchNorm2d]
    assert caught[0].filename == __file__


def test_strict_raises_before_anything_changes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Fused(4))
    with pytest.raises(syncnorm.SyncNormError, match=r"nothing was changed:\n  1 × Fused \(1\)"):
        syncnorm.convert(model, strict=True)
    assert type(model[0]) is nn.BatchNorm2d
    assert syncnorm.convert(model, strict=True, exclude=Fused) is model


def test_lazy_layers_convert_after_their_first_forward() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    assert "0" in skipped(model)
    model(torch.randn(2, 3, 4, 4))
    assert type(syncnorm.convert(model)[0]) is syncnorm.SyncBatchNorm2d


def test_parametrized_layers_are_left() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    assert "remove_parametrizations" in skipped(model)["0"]
    assert "remove_parametrizations" in skipped(model, "group_norm")["0"]


def test_pruned_layers_convert_and_stay_pruned() -> None:
    layer, plain = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    for pruned in (layer, plain):  # torch cannot deep-copy a pruned layer
        prune.l1_unstructured(pruned, "weight", amount=3)
    syncnorm.convert(layer, strict=True)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), plain(x))
    assert (layer(x).abs().sum(0) == 0).sum() == 3
    assert type(syncnorm.revert(layer)) is nn.BatchNorm1d


def test_layers_inside_a_metric_are_left() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Score(torchmetrics.Metric):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(3))

        def update(self, x: torch.Tensor) -> None: ...

        def compute(self) -> None: ...

    model = nn.ModuleDict({"net": nn.BatchNorm1d(3), "score": Score()})
    assert skipped(model) == {
        "score.net.0": "inside a torchmetrics metric (score), which meets other ranks in its own way; leave it"
    }
    model["score"].net[0] = model["net"]  # the model's own layer, which the metric sees too
    assert skipped(model) == {}
    assert skipped(nn.ModuleDict({"score": model["score"], "net": model["net"]})) == {}


def test_a_forward_put_on_the_object_is_not_ignored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].forward = model[0].forward  # as Accelerate's hooks do; a swapped class would not be asked
    assert "forward was replaced on the object" in skipped(model)["0"]


def test_quantised_layers_are_left() -> None:
    model = nn.Sequential(torch.ao.nn.quantized.BatchNorm2d(3))
    assert "quantised" in skipped(model)["0"]


def test_a_norm_that_quantisation_aware_training_folds_is_synchronised_and_not_replaced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager quantisation is deprecated
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        model = torch.ao.quantization.fuse_modules_qat(model.train(), [["0.0", "0.1", "0.2"]])
        assert "ConvBnReLU2d of torch.ao folds it" in skipped(model, to="group_norm")["0.0.1"]
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        model = torch.ao.quantization.prepare_qat(model)
    assert "ConvBnReLU2d of torch.ao folds it" in skipped(model, to="group_norm")["0.0.bn"]
    syncnorm.convert(model)
    assert type(model.get_submodule("0.0.bn")) is syncnorm.SyncBatchNorm2d
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    syncnorm.revert(model)
    assert type(model.get_submodule("0.0.bn")) is nn.BatchNorm2d


def test_scripted_layers_are_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))
    assert "TorchScript" in skipped(model)["0.0"]


class LookAlike(nn.Module):
    """Running statistics, and no torch batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))


class FrozenLookAlike(LookAlike):
    """As torchvision's FrozenBatchNorm2d: nothing to synchronise."""


def test_look_alikes_are_named_and_frozen_ones_not() -> None:
    model = nn.Sequential(LookAlike(), FrozenLookAlike())
    assert skipped(model) == {
        "0": "LookAlike keeps running statistics and is not a torch batch norm; rewrite it, or exclude it"
    }


def test_leftovers_of_sync_batchnorm_convert_and_come_back() -> None:
    layer_sync = pytest.importorskip("lightning.pytorch.plugins.layer_sync")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plugin = layer_sync.TorchSyncBatchNorm()
    model = plugin.revert(plugin.apply(model))
    leftover = type(model[1])
    assert leftover.__name__ == "_BatchNormXd"
    syncnorm.convert(model, strict=True)
    assert type(model[1]) is syncnorm.SyncBatchNorm
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)
    assert type(pickle.loads(pickle.dumps(model))[1]) is syncnorm.SyncBatchNorm
    assert type(syncnorm.revert(model)[1]) is leftover
    assert type(syncnorm.revert(model, dim=2)[1]) is nn.BatchNorm2d
