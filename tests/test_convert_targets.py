"""Tier: no process. Each target that puts another layer in a batch norm's place: values, what is kept, checkpoints."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm import modules
from syncnorm.conversion._targets import TARGETS
from tests.oracles import randomise_affine

PLACES = [to for to, target in TARGETS.items() if not target.swaps]
ACTIVATE = ["filter_response_norm", "evo_norm_b0", "evo_norm_s0"]
MIXTURES = ["evo_norm_b0", "switchable_norm", "batch_instance_norm"]
IMAGE = (4, 6, 5, 3)
# What a user would write instead, for six channels.
BY_HAND: dict[str, Any] = {
    "group_norm": lambda: modules.GroupNorm(6, 3, eps=0.1),
    "layer_norm": lambda: modules.GroupNorm(6, 1, eps=0.1),
    "instance_norm": lambda: modules.InstanceNorm2d(6, eps=0.1, affine=True),
    "rms_norm": lambda: modules.RMSNorm(6, eps=0.1, channel_dim=1),
    "filter_response_norm": lambda: nn.Sequential(modules.FilterResponseNorm(6), modules.TLU(6)),
    "evo_norm_b0": lambda: modules.EvoNormB0(6, momentum=0.3),
    "evo_norm_s0": lambda: modules.EvoNormS0(6, 3, eps=0.1),
    "dynamic_tanh": lambda: modules.DynamicTanh(6, channel_dim=1),
    "switchable_norm": lambda: modules.SwitchableNorm2d(6, eps=0.1, momentum=0.3),
    "batch_instance_norm": lambda: modules.BatchInstanceNorm2d(6, eps=0.1, momentum=0.3),
}

over_places = pytest.mark.parametrize("to", PLACES)
pytestmark = pytest.mark.filterwarnings("ignore:.*is a norm and an activation in one", "ignore:.*does not divide")


def options(to: str) -> dict[str, Any]:
    return {"num_groups": 3} if "num_groups" in TARGETS[to].options else {}


def batch_norm(**arguments: Any) -> nn.BatchNorm2d:
    torch.manual_seed(3)
    layer = nn.BatchNorm2d(6, eps=0.1, momentum=0.3, **arguments).double()
    randomise_affine(layer)
    if layer.running_var is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def converted(layer: nn.Module, to: str, **more: Any) -> Any:
    return syncnorm.convert(nn.Sequential(layer), to, **options(to), **more)[0]  # type: ignore[index]


def sample() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(IMAGE, dtype=torch.float64) * 2 + 1


def test_the_list_by_hand_is_complete() -> None:
    assert list(BY_HAND) == PLACES


@over_places
def test_the_layer_is_the_one_a_user_would_write(to: str) -> None:
    layer, mine = batch_norm(), BY_HAND[to]().double()
    state = layer.state_dict()
    mine.load_state_dict(
        {k: state[k.removeprefix("0.")] for k in mine.state_dict() if k.removeprefix("0.") in state}, False
    )
    norm, x = converted(layer, to), sample()
    for training in (True, False):
        torch.testing.assert_close(norm.train(training)(x), mine.train(training)(x), rtol=0, atol=0)
    assert isinstance(norm, TARGETS[to].layer_for(layer))  # type: ignore[arg-type]


def test_rms_norm_is_over_the_channels_of_each_position() -> None:
    layer, x = batch_norm(), sample()
    exact = x / (x.square().mean(1, keepdim=True) + 0.1).sqrt() * layer.weight.view(1, 6, 1, 1)
    torch.testing.assert_close(converted(layer, "rms_norm")(x), exact, rtol=0, atol=1e-14)


def test_batch_instance_norm_begins_as_the_batch_norm_it_replaces() -> None:
    layer, x = batch_norm(), sample()
    plain = copy.deepcopy(layer)
    norm = converted(layer, "batch_instance_norm")
    for training in (True, True, False):
        torch.testing.assert_close(norm.train(training)(x), plain.train(training)(x), rtol=0, atol=1e-13)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)


@over_places
@pytest.mark.parametrize("affine", ["affine", "no bias", "no affine"])
def test_tensors_are_the_same_objects_and_come_back(to: str, affine: str) -> None:
    layer = batch_norm(affine=affine != "no affine")
    if affine == "no bias":
        layer.register_parameter("bias", None)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in layer.state_dict(keep_vars=True).items()}
    model = nn.Sequential(layer.eval())
    norm: Any = syncnorm.convert(model, to, **options(to))[0]  # type: ignore[index]
    kept = {name for name, tensor in norm.state_dict(keep_vars=True).items() if id(tensor) == before.get(name, (0,))[0]}
    (entry,) = syncnorm.plan(nn.Sequential(copy.deepcopy(layer)), to, **options(to)).entries
    assert kept == set(before) - set(entry._verdict.dropped)
    assert not norm.training
    assert all(parameter.dtype == torch.float64 for parameter in norm.parameters())
    norm(sample()).sum()
    assert syncnorm.revert(model)[0] is layer  # type: ignore[index]
    after = layer.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(
        id(after[name]) == number and torch.equal(after[name], value) for name, (number, value) in before.items()
    )


@pytest.mark.parametrize("to", MIXTURES)
def test_statistics_go_on_and_stay(to: str) -> None:
    """A mixture tracks what batch norm tracks, so the way back has what training brought."""
    layer, x = batch_norm(), sample()
    plain = copy.deepcopy(layer)
    model = syncnorm.convert(nn.Sequential(layer), to)
    model(x), plain(x)
    syncnorm.revert(model)
    names = ["running_var"] if to == "evo_norm_b0" else ["running_mean", "running_var"]
    for name in names:
        torch.testing.assert_close(layer.get_buffer(name), plain.get_buffer(name), rtol=0, atol=1e-14)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("to", MIXTURES)
def test_half_precision_keeps_statistics_wide_and_gives_them_back(to: str) -> None:
    layer = batch_norm().to(torch.bfloat16)
    model = syncnorm.convert(nn.Sequential(layer), to)
    assert model(sample().to(torch.bfloat16)).dtype == torch.bfloat16
    learned = model[0].running_var  # type: ignore[union-attr, index]
    assert learned.dtype == torch.float32
    assert syncnorm.revert(model)[0] is layer  # type: ignore[index]
    assert torch.equal(layer.running_var, learned.to(torch.bfloat16))  # type: ignore[union-attr, arg-type]
    assert model(sample().to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("to", MIXTURES)
def test_the_group_of_a_synchronised_layer_is_kept(to: str) -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), include="0", process_group=2)
    syncnorm.convert(model, to)
    assert [layer.process_group for layer in model] == [2, "world"]
    syncnorm.convert(model, to, strict=True)
    with pytest.raises(syncnorm.SyncNormError, match=r"syncnorm\.revert\(model\) first"):
        syncnorm.convert(model, to, process_group="node", strict=True)
    assert syncnorm.convert(syncnorm.revert(model), to, process_group="node")[0].process_group == "node"  # type: ignore[index, union-attr]


@over_places
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_checkpoints(to: str, metadata: bool, through: Any) -> None:
    """A batch norm's loads strictly, a torch of long ago had no counter, and the model's own goes round."""

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)))

    def plain(state: Any) -> Any:
        return state if metadata else dict(state)

    theirs = net()
    randomise_affine(theirs)
    old = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    model = through(syncnorm.convert(net(), to, **options(to)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    extra = {name: value.clone() for name, value in model.state_dict().items() if name not in theirs.state_dict()}
    for state in (plain(theirs.state_dict()), old):
        names = list(state)
        model.load_state_dict(state, strict=True)
        assert list(state) == names
        for name, value in model.state_dict().items():
            assert torch.equal(value, state.get(name, extra.get(name, value))), name
    another = syncnorm.convert(net(), to, **options(to))
    another.load_state_dict(plain(model.state_dict()), strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in another.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**old, "1.0.surprise": torch.zeros(1)}, strict=True)
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({name: value for name, value in old.items() if name != "1.0.weight"}, strict=True)


@pytest.mark.parametrize("to", ["sync_batch_norm", "batch_renorm", "frozen_batch_norm", "group_norm"])
@pytest.mark.parametrize("source", ["sync_batch_norm", "batch_renorm", "frozen_batch_norm"])
def test_checkpoints_of_the_whole_family_load(to: str, source: str) -> None:
    made = syncnorm.convert(nn.Sequential(batch_norm()), source)
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(6).double()), to, **options(to))
    model.load_state_dict(dict(made.state_dict()), strict=True)
    assert torch.equal(model[0].weight, made[0].weight)  # type: ignore[index, union-attr]


def test_affine_that_is_dropped_is_passed_over_in_a_checkpoint() -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(6)), "group_norm", num_groups=2, affine=False)
    model.load_state_dict(nn.BatchNorm2d(6).state_dict(prefix="0."), strict=True)


@pytest.mark.parametrize("to", ACTIVATE)
@pytest.mark.filterwarnings("default")
def test_a_norm_that_activates_says_that_the_activation_behind_it_has_to_go(to: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU())
    assert syncnorm.plan(model, to).entries[0].reason.endswith("activates too: remove the activation that follows")
    with pytest.warns(
        UserWarning, match=r"is a norm and an activation in one. Remove the activation that followed 0; sync"
    ):
        syncnorm.convert(model, to)
    assert type(model[1]) is nn.ReLU


@pytest.mark.filterwarnings("error")
def test_filter_response_norm_without_its_activation() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    assert "activates" not in str(syncnorm.plan(model, "filter_response_norm", tlu=False))
    assert "threshold" not in dict(syncnorm.convert(model, "filter_response_norm", tlu=False)[0].named_parameters())  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("to", "given", "error", "text"),
    [
        (
            "rms_norm",
            {"p": 0},
            ValueError,
            "p is the share of the features that the RMS is taken over, in (0, 1]; got 0",
        ),
        (
            "rms_norm",
            {"channel_dim": 2},
            TypeError,
            "got channel_dim=2.",
        ),
        (["group_norm"], {}, ValueError, "to must be one of ['sync_batch_norm', "),
        ("dynamic_tanh", {"alpha": "1"}, TypeError, "alpha must be float, got '1'."),
        ("switchable_norm", {"using_bn": 1}, TypeError, "using_bn must be bool, got 1."),
        ("switchable_norm", {"process_group": 0}, ValueError, "at least 1; got 0"),
        ("filter_response_norm", {"eps": 0.0}, ValueError, "FilterResponseNorm: eps must be positive, got 0.0"),
        ("evo_norm_s0", {"num_groups": 2.0}, TypeError, "num_groups must be int, got 2.0."),
        ("evo_norm_s0", {"num_groups": -1}, ValueError, "num_groups is a number of groups, at least 1; got -1."),
        ("batch_renorm", {"r_max": 0.5}, ValueError, "r_max must be at least 1"),
        ("batch_renorm", {"r_max": "2"}, TypeError, "r_max must be float, got '2'."),
        ("ghost_batch_norm", {"virtual_batch_size": 0}, ValueError, "is a number of samples, at least 1; got 0"),
        (
            "sync_batch_norm",
            {"activation": "relu"},
            TypeError,
            "takes the options ['process_group', 'backend', 'accumul",
        ),
    ],
)
def test_options_are_those_of_the_layer(to: str, given: dict[str, Any], error: type[Exception], text: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(8))
    with pytest.raises(error, match=re.escape(text)):
        syncnorm.convert(model, to, **given)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_layer_with_an_activation_inside_is_not_replaced() -> None:
    layer = syncnorm.SyncBatchNorm2d(4, activation="relu")
    (entry,) = syncnorm.plan(nn.Sequential(layer), "group_norm", num_groups=2).entries
    assert (entry.action, entry.reason) == ("skip", "it applies 'relu' too, which group_norm would lose; exclude it")
