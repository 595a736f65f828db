"""Tier: no process. Which layers a user means, and what is said to one who asks for the impossible; nothing half done."""

import re
from typing import Any, get_args

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm.conversion import To
from syncnorm.conversion._targets import TARGET_OPTIONS, TARGETS
from syncnorm.kernels import BACKENDS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.BatchNorm1d(8))


def converted(**arguments: Any) -> list[str]:
    model = syncnorm.convert(Net(), **arguments)
    return [name for name, module in model.named_modules() if syncnorm.modules.is_synced(module)]


def large(name: str, module: nn.Module) -> bool:
    return int(module.num_features) > 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["stem.1", "head.1", "head.3"]),
        ({"include": "head.*"}, ["head.1", "head.3"]),
        ({"include": "head.[13]"}, ["head.1", "head.3"]),
        ({"include": ["stem.1", "head.3"]}, ["stem.1", "head.3"]),
        ({"include": nn.BatchNorm1d}, ["head.1", "head.3"]),
        ({"include": large}, ["head.1", "head.3"]),
        ({"include": lambda name, module: name.endswith("1")}, ["stem.1", "head.1"]),
        ({"exclude": "head.*"}, ["stem.1"]),
        ({"exclude": (nn.BatchNorm2d, "head.3")}, ["head.1"]),
        ({"include": "head.*", "exclude": "*.3"}, ["head.1"]),
        ({"exclude": ()}, ["stem.1", "head.1", "head.3"]),
    ],
)
def test_patterns(arguments: dict[str, Any], expected: list[str]) -> None:
    assert converted(**arguments) == expected


def test_every_alias_is_a_name() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    syncnorm.convert(model, include="b")
    assert syncnorm.modules.is_synced(model["a"])


@pytest.mark.parametrize("again", [nn.BatchNorm1d, large, "head.*"])
def test_patterns_mean_the_same_layers_the_second_time(again: Any) -> None:
    model = syncnorm.convert(Net(), "group_norm", num_groups=2, include=again)
    plan = syncnorm.plan(model, "group_norm", num_groups=2, include=again)
    assert plan.counts == {"swap": 0, "replace": 0, "keep": 3, "skip": 0}


def test_the_targets_are_those_of_the_type() -> None:
    assert tuple(TARGETS) == get_args(To)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"to": "groupnorm"},
        ValueError,
        f"to must be one of {list(get_args(To))}, got 'groupnorm'. Did you mean 'group_norm'?",
    ),
    (
        {"to": "group_norm", "groups": 4},
        TypeError,
        f"to='group_norm' takes the options {list(TARGET_OPTIONS['group_norm'])}, got groups=4. Did you mean 'num_groups'?",
    ),
    (
        {"to": "sync_batch_norm", "num_groups": 4},
        TypeError,
        f"to='sync_batch_norm' takes the options {list(TARGET_OPTIONS['sync_batch_norm'])}, got num_groups=4. "
        "It belongs to group_norm and evo_norm_s0.",
    ),
    (
        {"to": "layer_norm", "process_group": "world"},
        TypeError,
        "got process_group='world'. It belongs to sync_batch_norm, batch_renorm, ghost_batch_norm, "
        "moving_average_batch_norm, evo_norm_b0, switchable_norm and batch_instance_norm.",
    ),
    ({"to": "group_norm", "num_groups": 0}, ValueError, "num_groups is a number of groups, at least 1; got 0."),
    (
        {"to": "group_norm", "affine": "yes"},
        TypeError,
        "affine must be True, False or None (as each layer has it), got 'yes'.",
    ),
    ({"backend": "cuda"}, ValueError, f"backend must be one of {['auto', *BACKENDS]}, got 'cuda'."),
    ({"accumulate": 0}, ValueError, "accumulate is a number of micro-batches, at least 1; got 0."),
    ({"process_group": "all"}, ValueError, 'process_group as a string must be "world" or "node", got \'all\'.'),
    (
        {"include": "head"},
        ValueError,
        "include='head' matches no normalisation layer that uses batch statistics. It names a container; 'head.*' means "
        "the 2 layers in it.",
    ),
    (
        {"exclude": ["head.*", "steam.1"]},
        ValueError,
        "exclude='steam.1' matches no normalisation layer that uses batch statistics. Close names are ['stem.1'",
    ),
    ({"include": "head.2"}, ValueError, "There, the model has a LayerNorm."),
    ({"include": nn.BatchNorm3d}, ValueError, "include=BatchNorm3d matches no normalisation layer"),
    ({"exclude": lambda name, module: False}, ValueError, "exclude=<lambda> matches no normalisation layer"),
    ({"include": []}, ValueError, "include is empty, so nothing would be converted. None converts all layers."),
    ({"include": dict}, TypeError, "include takes types of modules, got dict, which is not an nn.Module."),
    (
        {"exclude": 3},
        TypeError,
        "exclude takes globs on qualified names, module types, callables (name, module) -> bool",
    ),
    ({"exclude": nn.BatchNorm1d(3)}, TypeError, "exclude takes globs on qualified names, module types, callables"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
@pytest.mark.parametrize("function", [syncnorm.convert, syncnorm.plan])
def test_bad_arguments_say_what_to_do_and_change_nothing(
    function: Any, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = Net()
    types = [type(module) for module in model.modules()]
    with pytest.raises(error, match=re.escape(text)):
        function(model, **arguments)
    assert [type(module) for module in model.modules()] == types


def test_what_is_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"convert and plan take an nn.Module, got Tensor"):
        syncnorm.convert(torch.zeros(3))  # type: ignore[arg-type]
