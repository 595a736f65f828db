"""Tier: no process. Another kind of norm in a batch norm's place: values, parameters, aliases, old checkpoints."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import syncnorm
from syncnorm.modules import BatchNorm

SHAPES = {nn.BatchNorm1d: (3, 6, 5), nn.BatchNorm2d: (3, 6, 5, 4), nn.BatchNorm3d: (3, 6, 3, 2, 4)}


def randomised(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def replaced(layer: nn.Module, to: str, **options: Any) -> nn.Module:
    return syncnorm.convert(nn.Sequential(layer), to, **options)[0]  # type: ignore[index]


@pytest.mark.parametrize("source", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_torchs_with_the_affine_carried_over(source: Any, affine: bool) -> None:
    layer = randomised(source(6, eps=0.1, affine=affine, dtype=torch.float64))
    x = torch.randn(SHAPES[source], dtype=torch.float64)
    norm = replaced(layer, "group_norm", num_groups=3)
    assert type(norm) is syncnorm.GroupNorm
    torch.testing.assert_close(norm(x), functional.group_norm(x, 3, layer.weight, layer.bias, 0.1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("source", SHAPES)
def test_layer_norm_is_over_channels_and_space(source: Any) -> None:
    layer = randomised(source(6, eps=0.1, dtype=torch.float64))
    x = torch.randn(SHAPES[source], dtype=torch.float64)
    exact = functional.layer_norm(x, x.shape[1:], eps=0.1)
    per_channel = [1, 6] + [1] * (x.dim() - 2)
    exact = exact * layer.weight.view(per_channel) + layer.bias.view(per_channel)
    torch.testing.assert_close(replaced(layer, "layer_norm")(x), exact, rtol=0, atol=1e-13)


def test_layer_norm_takes_features_too() -> None:
    layer = randomised(nn.BatchNorm1d(6, eps=0.1, dtype=torch.float64))
    x = torch.randn(3, 6, dtype=torch.float64)
    exact = functional.layer_norm(x, (6,), layer.weight, layer.bias, 0.1)
    torch.testing.assert_close(replaced(layer, "layer_norm")(x), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("source", SHAPES)
def test_instance_norm_is_batch_norm_on_each_sample_alone(source: Any) -> None:
    layer = randomised(source(6, eps=0.1, dtype=torch.float64))
    x = torch.randn(SHAPES[source], dtype=torch.float64)
    exact = torch.cat([copy.deepcopy(layer)(sample.unsqueeze(0)) for sample in x])
    norm = replaced(layer, "instance_norm")
    assert type(norm).__name__ == f"InstanceNorm{x.dim() - 2}d"
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("to", ["group_norm", "layer_norm", "instance_norm"])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_the_same_objects(to: str, bias: bool) -> None:
    layer = nn.BatchNorm2d(32, dtype=torch.float64).eval()
    if not bias:
        layer.register_parameter("bias", None)
    layer.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    norm = replaced(layer, to)
    assert norm.weight is layer.weight
    assert norm.bias is layer.bias
    assert norm.eps == layer.eps
    assert not norm.training
    assert not norm.weight.requires_grad
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in norm.parameters()]
    assert norm(torch.randn(2, 32, 3, 3, dtype=torch.float64)).shape == (2, 32, 3, 3)


def test_parameters_on_meta_stay_there() -> None:
    norm = replaced(nn.BatchNorm2d(32, device="meta"), "group_norm")
    assert norm(torch.empty(2, 32, 3, 3, device="meta")).shape == (2, 32, 3, 3)
    assert replaced(nn.BatchNorm2d(32, affine=False, device="meta"), "group_norm", affine=True).weight.is_meta


def test_affine_can_be_added_and_dropped() -> None:
    added = replaced(nn.BatchNorm2d(4, affine=False, dtype=torch.float64), "layer_norm", affine=True)
    assert added.weight.dtype == torch.float64
    assert added.weight.eq(1).all()
    assert added.bias.eq(0).all()
    assert added.weight.requires_grad
    layer = nn.BatchNorm2d(4)
    model = syncnorm.convert(nn.Sequential(layer), "layer_norm", affine=False)
    assert list(model.parameters()) == []
    weight = layer.weight
    syncnorm.revert(model)
    assert model[0].weight is weight


def test_affine_is_made_in_the_dtype_of_the_model_where_the_layer_has_none() -> None:
    bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, dtype=torch.float64), bare)
    assert syncnorm.convert(model, "layer_norm", affine=True)[1].weight.dtype == torch.float64


def test_a_number_of_groups_that_does_not_divide_is_said_aloud() -> None:
    model = nn.Sequential(nn.BatchNorm2d(48), nn.BatchNorm2d(64), nn.BatchNorm2d(3))
    reasons = [entry.reason for entry in syncnorm.plan(model, "group_norm").entries]
    assert reasons[0] == (
        "32 does not divide 48, 16 = gcd(32, 48) does; weight and bias carried over; running statistics dropped"
    )
    assert reasons[1] == "weight and bias carried over; running statistics dropped"
    with pytest.warns(
        UserWarning,
        match=r"num_groups=32 does not divide .* 0 → GroupNorm\(48, num_groups=16\), 2 → GroupNorm\(3, num_groups=1\)\.",
    ):
        syncnorm.convert(model, "group_norm")
    assert [norm.num_groups for norm in model] == [16, 32, 1]


def test_every_alias_in_every_parent_is_replaced_by_one_module_in_order() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": shared, "b": nn.Conv2d(4, 4, 1), "c": shared, "d": nn.ModuleList([shared])})
    syncnorm.convert(model, "layer_norm")
    assert list(model) == ["a", "b", "c", "d"]
    assert model["a"] is model["c"] is model["d"][0]  # type: ignore[index]
    assert type(model["a"]) is syncnorm.GroupNorm
    assert len(list(model.parameters())) == 4


def test_hooks_and_attributes_move_and_handles_still_remove_them() -> None:
    layer, fired = nn.BatchNorm2d(4), []
    layer.qconfig = "a qconfig"  # type: ignore[assignment]
    modules: list[nn.Module] = []
    handles = [
        layer.register_forward_hook(lambda module, *_: fired.append("forward") or modules.append(module)),
        layer.register_forward_pre_hook(lambda *_: fired.append("pre")),
        layer.register_full_backward_hook(lambda *_: fired.append("backward")),
        layer.register_load_state_dict_pre_hook(lambda module, *_: fired.append("load") or modules.append(module)),
    ]
    model = syncnorm.convert(nn.Sequential(layer), "layer_norm")
    model(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert fired == ["pre", "forward", "backward", "load"]
    assert all(module is model[0] for module in modules)
    assert model[0].qconfig == "a qconfig"
    syncnorm.revert(model)
    modules.clear()
    model.load_state_dict(model.state_dict())
    assert modules == [layer]
    for handle in handles:
        handle.remove()
    fired.clear()
    model(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert fired == []


@pytest.mark.parametrize("to", ["group_norm", "layer_norm", "instance_norm"])
@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_checkpoint_of_the_batch_norm_loads_strictly(to: str, through: Any) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))

    checkpoint = randomised(net()).state_dict()
    names = list(checkpoint)
    model = through(syncnorm.convert(net(), to, **({"num_groups": 2} if to == "group_norm" else {})))
    model.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == names
    assert torch.equal(model[1][0].weight, checkpoint["1.0.weight"])
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    model.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**checkpoint, "1.0.surprise": torch.zeros(1)}, strict=True)


@pytest.mark.parametrize("source", [nn.SyncBatchNorm, BatchNorm, syncnorm.SyncBatchNorm, syncnorm.SyncBatchNorm2d])
def test_synchronised_and_dimensionless_layers(source: Any) -> None:
    layer = source(4)
    assert type(replaced(layer, "layer_norm")) is syncnorm.GroupNorm
    plan = syncnorm.plan(nn.Sequential(source(4)), "instance_norm")
    if source is syncnorm.SyncBatchNorm2d:
        assert plan.entries[0].target == "InstanceNorm2d(4, affine=True)"
    else:
        assert (
            plan.entries[0].reason == "does not know whether it is 1d, 2d or 3d; syncnorm.revert(model, dim=...) first"
        )


def test_one_value_per_group_is_refused_and_not_turned_into_the_bias() -> None:
    for options in ({"to": "instance_norm"}, {"to": "group_norm", "num_groups": 4}):
        model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), **options)  # type: ignore[arg-type]
        assert model(torch.randn(4, 4, 7)).shape == (4, 4, 7)
        with pytest.raises(
            ValueError, match=r"expects an input \[N, C, \*\] of at least 3 dims, got \[4, 4\]: one value per"
        ):
            model(torch.randn(4, 4))
        syncnorm.revert(model)
        assert model(torch.randn(4, 4)).shape == (4, 4)


def test_layers_that_would_lose_something_are_left() -> None:
    class Extended(nn.BatchNorm2d):
        """No forward of its own, but who knows."""

    pruned, extra, compiled = nn.BatchNorm2d(4), nn.BatchNorm2d(4), torch.compile(nn.BatchNorm2d(4), backend="eager")
    prune.l1_unstructured(pruned, "weight", amount=1)
    extra.register_buffer("mask", torch.ones(4))
    model = nn.ModuleDict({"pruned": pruned, "extra": extra, "own": Extended(4), "compiled": compiled})
    reasons = {entry.name: entry.reason for entry in syncnorm.plan(model, "group_norm").entries}
    assert "pruned or weight-normed, which group_norm would lose" in reasons["pruned"]
    assert "it holds ['mask'], which group_norm would lose" in reasons["extra"]
    assert "Extended may do more than batch norm" in reasons["own"]
    assert "convert before compiling" in reasons["compiled._orig_mod"]


def test_twice_is_once_and_another_kind_needs_a_revert() -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(8)), "group_norm", num_groups=4)
    norm = model[0]
    syncnorm.convert(model, "group_norm", num_groups=4, strict=True)
    assert model[0] is norm
    for to, options in (("group_norm", {"num_groups": 2}), ("layer_norm", {}), ("sync_batch_norm", {})):
        with pytest.raises(
            syncnorm.SyncNormError, match=r"took the place of BatchNorm2d; syncnorm.revert\(model\) first"
        ):
            syncnorm.convert(model, to, strict=True, **options)  # type: ignore[arg-type]
    syncnorm.convert(syncnorm.revert(model), strict=True)
    assert type(model[0]) is syncnorm.SyncBatchNorm2d
