"""Tier: no process. Batch norm to group norm and weight standardisation in one go: convolutions only change their class."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import syncnorm
from syncnorm.modules import WeightCentralizedConv2d, WeightStandardizedConv1d, WeightStandardizedConv2d
from tests.oracles import randomise_affine

RECIPE: dict[str, Any] = {"to": "group_norm", "num_groups": 2, "weight_standardization": True}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 2, 2, bias=False), nn.BatchNorm1d(2))
    model = nn.Sequential(stem, head).double()
    randomise_affine(model)
    return model


def standardised(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    return ((rows - mean) / (var + 1e-5).sqrt()).reshape(weight.shape)


def test_values_are_those_of_the_formulas() -> None:
    model, x = net(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    conv, norm = model[0][0], model[0][1]  # type: ignore[index]
    padded = functional.pad(x, (1, 1, 1, 1), mode="circular")
    h = functional.conv2d(padded, standardised(conv.weight), conv.bias, stride=2)  # type: ignore[union-attr, arg-type]
    h = functional.group_norm(h, 2, norm.weight, norm.bias).relu().flatten(2)  # type: ignore[union-attr, arg-type]
    conv, norm = model[1][1], model[1][2]  # type: ignore[index]
    y = functional.conv1d(h, standardised(conv.weight))  # type: ignore[union-attr, arg-type]
    y = functional.group_norm(y, 2, norm.weight, norm.bias)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(syncnorm.convert(model, **RECIPE)(x), y, rtol=0, atol=1e-13)


def test_convolutions_stay_the_same_objects_and_come_back() -> None:
    model = net()
    model[0][0].note = "mine"  # type: ignore[index, union-attr]
    convolutions = [model[0][0], model[1][1]]  # type: ignore[index]
    before = [(type(conv), dict(vars(conv)), repr(conv)) for conv in convolutions]
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    syncnorm.convert(model, **RECIPE)
    assert [type(conv) for conv in convolutions] == [WeightStandardizedConv2d, WeightStandardizedConv1d]
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}.items() <= {
        name: number for name, (number, _) in state.items()
    }.items()
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        syncnorm.revert(made)
        assert [type(made[0][0]), type(made[1][1])] == [nn.Conv2d, nn.Conv1d]
        assert [repr(made[0][0]), repr(made[1][1])] == [text for _, _, text in before]
    assert [(type(conv), dict(vars(conv)), repr(conv)) for conv in convolutions] == before
    assert {name: (id(v), v.equal(state[name][1])) for name, v in model.state_dict(keep_vars=True).items()} == {
        name: (number, True) for name, (number, _) in state.items()
    }


@pytest.mark.parametrize("metadata", [True, False])
def test_checkpoints_load_strictly(metadata: bool) -> None:
    checkpoint = net().state_dict() if metadata else dict(net().state_dict())
    model = syncnorm.convert(net(), **RECIPE)
    model.load_state_dict(checkpoint, strict=True)
    again = syncnorm.convert(net(), **RECIPE)
    again.load_state_dict(model.state_dict() if metadata else dict(model.state_dict()), strict=True)


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"exclude": "1.*"}, ["WeightStandardizedConv2d", "Conv1d"]),
        ({"include": "1.*"}, ["Conv2d", "WeightStandardizedConv1d"]),
        ({"exclude": "1.1"}, ["WeightStandardizedConv2d", "Conv1d"]),
        ({"include": nn.BatchNorm2d}, ["WeightStandardizedConv2d", "WeightStandardizedConv1d"]),
        (
            {"exclude": lambda name, norm: norm.num_features == 2},
            ["WeightStandardizedConv2d", "WeightStandardizedConv1d"],
        ),
    ],
)
def test_globs_select_convolutions_too_and_types_and_functions_norms_alone(patterns: Any, expected: list[str]) -> None:
    assert kinds(syncnorm.convert(net(), **RECIPE, **patterns)) == expected


def test_globs_that_select_no_convolution_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"include='0\.1' selects no convolution for weight_standardization: globs are for"
    ):
        syncnorm.convert(net(), **RECIPE, include="0.1")


class SamePadded(nn.Conv2d):
    """Who knows what it does."""


def test_what_cannot_be_standardised_is_left_and_said() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4), SamePadded(4, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.LazyConv2d(4, 1), nn.ConvTranspose2d(4, 4, 3),
        WeightStandardizedConv2d(4, 4, 3), nn.Conv2d(4, 4, 3),
    )  # fmt: skip
    model[6].forward = model[6].forward
    rows = {entry.name: (entry.action, entry.reason) for entry in syncnorm.plan(model, **RECIPE).entries[1:]}
    assert rows == {
        "1": ("skip", "SamePadded may do more than convolve; syncnorm.modules.weight_standardization(layer) does it, or "
                      "exclude the layer"),
        "2": ("skip", "filters of one value each, which would become 0; exclude it"),
        "3": ("skip", "lazy, its filters are not known yet; run one forward pass, then convert"),
        "5": ("keep", "there already, weight_standardization"),
        "6": ("skip", "forward was replaced on the object (by a hook of another library?); convert before that"),
    }  # fmt: skip
    with pytest.raises(syncnorm.SyncNormError, match=re.escape("1 × SamePadded (1)")):
        syncnorm.convert(model, **RECIPE, strict=True)
    with pytest.warns(UserWarning, match="left 4 as they were"):
        syncnorm.convert(model, **RECIPE)
    assert type(syncnorm.revert(model)[5]) is WeightStandardizedConv2d  # type: ignore[index]  # it was there before


def test_twice_is_once_and_the_half_can_be_added_later() -> None:
    model = syncnorm.convert(net(), "group_norm", num_groups=2)
    assert kinds(model) == ["Conv2d", "Conv1d"]
    assert syncnorm.plan(model, **RECIPE).counts == {"swap": 2, "replace": 0, "keep": 2, "skip": 0}
    syncnorm.convert(model, **RECIPE, strict=True)
    assert syncnorm.plan(model, **RECIPE).counts == {"swap": 0, "replace": 0, "keep": 4, "skip": 0}


def test_the_option_belongs_to_group_norm() -> None:
    with pytest.raises(TypeError, match=r"got weight_standardization=True\. It belongs to group_norm\."):
        syncnorm.convert(net(), weight_standardization=True)
    with pytest.raises(TypeError, match="weight_standardization must be True or False, got 1"):
        syncnorm.convert(net(), "group_norm", weight_standardization=1)
    assert kinds(syncnorm.convert(net(), "group_norm", num_groups=1, weight_standardization=False)) == [
        "Conv2d",
        "Conv1d",
    ]


def test_moving_average_batch_norm_with_centred_weights() -> None:
    model, plain = net(), net()
    syncnorm.convert(model, "moving_average_batch_norm", weight_centralization=True, include="0.*", window=4)
    conv, norm = model[0][0], model[0][1]  # type: ignore[index]
    assert (type(conv), type(norm).__name__, norm.window) == (WeightCentralizedConv2d, "MovingAverageBatchNorm2d", 4)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    padded = functional.pad(x, (1, 1, 1, 1), mode="circular")
    centred = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)  # type: ignore[union-attr, operator]
    h = functional.conv2d(padded, centred, conv.bias, stride=2)  # type: ignore[arg-type, union-attr]
    expected = nn.functional.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(model.eval()[0][:2](x), expected, rtol=0, atol=1e-13)  # type: ignore[index, operator]
    (entry, *_) = syncnorm.plan(plain, "moving_average_batch_norm").entries
    assert entry.reason == (
        "group world; does not centre; weight_centralization=True does, and then calls for reset_running_stats()"
    )
    model.load_state_dict(plain.state_dict(), strict=True)
    assert [type(module) for module in syncnorm.revert(model).modules()] == [type(module) for module in plain.modules()]
