"""Tier: no process. State that torch loads without a word is refused by key and channel, and no conversion takes it over."""

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm import validate_state_dict

State = dict[str, Any]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm2d(4)))


def put(key: str, channel: int, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[key] = state[key].clone()
        state[key].view(-1)[channel] = value

    return change


def replace(key: str, value: Any) -> Callable[[State], None]:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "said", "torch_loads_it"),
    [
        (put("1.running_var", 2, -1.0), "1.running_var is negative in channel [2] of 4 (-1)", True),
        (put("2.1.running_mean", 0, float("nan")), "2.1.running_mean is not finite in channel [0] of 4 (nan)", True),
        (put("1.weight", 3, float("-inf")), "1.weight is not finite in channel [3] of 4 (-inf)", True),
        (put("2.0.bias", 1, float("inf")), "2.0.bias is not finite in channel [1] of 4 (inf)", True),
        (put("1.num_batches_tracked", 0, -1), "1.num_batches_tracked is negative in its one value (-1)", True),
        (replace("1.running_var", torch.ones(4, dtype=torch.complex64)), "must be floating point, is complex64", True),
        (replace("1.running_var", torch.ones(4, dtype=torch.int32)), "must be floating point, is int32", True),
        (replace("1.num_batches_tracked", torch.tensor(2.5)), "must be an integer, is float32", True),
        (replace("1.num_batches_tracked", torch.tensor(True)), "must be an integer, is bool", True),
        (replace("1.running_mean", torch.zeros(5)), "1.running_mean must have shape [4], has [5]", False),
        (replace("1.running_mean", [0.0] * 4), "1.running_mean must be a tensor, is list", False),
        (
            replace("1.running_var", torch.ones(4).to_sparse()),
            "must be a plain dense tensor, is torch.sparse_coo",
            False,
        ),
    ],
)
def test_what_no_norm_can_have_written(change: Callable[[State], None], said: str, torch_loads_it: bool) -> None:
    model = net()
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match="1 entries of the state dict are nothing that a norm") as raised:
        validate_state_dict(model, state)
    assert said in str(raised.value)
    if torch_loads_it:  # the reason why this function exists
        with pytest.warns(UserWarning, match="complex") if "complex" in said else contextlib.nullcontext():
            copy.deepcopy(model).load_state_dict(state, strict=True)


def test_all_faults_are_told_at_once_and_long_lists_are_cut() -> None:
    layer = nn.BatchNorm1d(20)
    state = {"running_mean": torch.full((20,), torch.nan), "running_var": torch.arange(20.0) - 1.5}
    with pytest.raises(ValueError) as raised:
        validate_state_dict(layer, state)
    text = str(raised.value)
    assert text.startswith("2 entries of the state dict")
    assert "channels [0, 1, 2, 3, 4, 5, 6, 7] and 12 more of 20 (nan, nan," in text
    assert "running_var is negative in channels [0, 1] of 20 (-1.5, -0.5)" in text


def test_sound_states_pass_and_are_counted() -> None:
    model = net()
    assert validate_state_dict(model, model.state_dict()) == 12
    assert validate_state_dict(syncnorm.convert(copy.deepcopy(model)), model.state_dict()) == 12
    assert validate_state_dict(model[1], model[1].half().state_dict()) == 5
    assert validate_state_dict(model, {}) == 0
    assert validate_state_dict(nn.Linear(2, 2), nn.Linear(2, 2).state_dict()) == 0
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert validate_state_dict(model, torch.load(buffer, weights_only=True)) == 12
    with torch.device("meta"):
        assert validate_state_dict(model, net().state_dict()) == 12


def test_every_layer_of_the_package_accepts_its_own_state() -> None:
    layers = [
        syncnorm.SyncBatchNorm1d(3, accumulate=2), syncnorm.BatchRenorm2d(3), syncnorm.RunningNorm(3), syncnorm.Standardize(2),
        syncnorm.MinMaxScale(2), syncnorm.BatchNormLSTM(2, 3, max_length=4), syncnorm.FilterResponseNorm(3),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.SyncBatchNorm(3),
    ]  # fmt: skip
    for layer in layers:
        assert validate_state_dict(layer, layer.state_dict()) == len(layer.state_dict()), layer


def test_wrappers_on_either_side_do_not_hide_an_entry() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    bad = dict(model.state_dict()) | {"1.running_var": -torch.ones(4)}
    for target in (compiled, nn.ModuleDict({"net": compiled})["net"]):
        with pytest.raises(ValueError, match=r"1\.running_var is negative"):
            validate_state_dict(target, bad)
        with pytest.raises(ValueError, match=r"_orig_mod\.1\.running_var is negative"):
            validate_state_dict(target, {f"_orig_mod.{key}": value for key, value in bad.items()})


def test_a_shared_layer_is_checked_under_every_name() -> None:
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, norm)
    with pytest.raises(ValueError, match=r"1\.running_var is negative"):
        validate_state_dict(model, {**model.state_dict(), "1.running_var": -torch.ones(2)})


def test_a_state_dict_of_something_else_is_not_a_sound_one() -> None:
    state = {f"model.{key}": value for key, value in net().state_dict().items()}
    with pytest.raises(
        ValueError, match=r"which has entries like '1\.weight'; its keys are like 'model\.0\.weight'. Strip"
    ):
        validate_state_dict(net(), state)
    with pytest.raises(ValueError, match=r"pass checkpoint\['state_dict'\]"):
        validate_state_dict(net(), {"epoch": 3, "state_dict": net().state_dict()})
    with pytest.raises(
        TypeError, match=r"takes an nn\.Module and a mapping of names to tensors, got Sequential and list"
    ):
        validate_state_dict(net(), [])  # type: ignore[arg-type]


# The converters


@pytest.mark.parametrize("to", ["sync_batch_norm", "frozen_batch_norm", "instance_norm", "switchable_norm"])
def test_conversion_does_not_take_over_hostile_statistics(to: str) -> None:
    model = net()
    model[2][1].running_var[3] = -2.0
    model[1].num_batches_tracked.fill_(-1)
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    if to == "instance_norm":  # has no statistics to take over
        syncnorm.convert(model, to=to)
        return
    with pytest.raises(ValueError) as raised:
        syncnorm.convert(model, to=to)
    text = str(raised.value)
    assert text.startswith(
        f"convert(to={to!r}) would take over statistics that no training on finite numbers can have written"
    )
    assert "  1 (BatchNorm2d): num_batches_tracked is negative in its one value (-1)\n" in text
    assert "  2.1 (BatchNorm2d): running_var is negative in channel [3] of 4 (-2)\n" in text
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in (model[1], model[2][1]):
        layer.reset_running_stats()
    syncnorm.convert(model, to=to)


def test_layers_that_are_not_converted_are_not_asked() -> None:
    model = net()
    model[1].running_mean.fill_(torch.nan)
    syncnorm.convert(model, exclude="1")
    assert isinstance(model[2][1], syncnorm.SyncBatchNorm2d)
