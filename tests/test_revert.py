"""Tier: no process. The way back gives the exact original types, objects and bits, whatever happened in between."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import syncnorm
from syncnorm.modules import BatchNorm

TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("sync_batch_norm", {"process_group": 2, "backend": "reference", "accumulate": 2}),
    ("group_norm", {"num_groups": 2}),
    ("layer_norm", {}),
    ("instance_norm", {}),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm3d(4).eval()
        self.alias, self.inner = self.bn1, nn.Sequential(self.bn1, nn.BatchNorm2d(6, momentum=None))
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.copy_(torch.rand(tensor.shape) + 1)


@pytest.mark.parametrize(("to", "options"), TARGETS)
def test_types_objects_bits_and_flags_come_back(to: str, options: dict[str, Any]) -> None:
    model = Net()
    objects = dict(model.named_modules(remove_duplicate=False))
    types = {name: type(module) for name, module in objects.items()}
    flags = {name: module.training for name, module in objects.items()}
    attributes = {name: list(vars(module)) for name, module in objects.items()}
    state = copy.deepcopy(model.state_dict())
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    syncnorm.convert(model, to, **options)
    assert type(model.bn1) is not nn.BatchNorm1d
    assert syncnorm.revert(model) is model

    again = dict(model.named_modules(remove_duplicate=False))
    assert list(again) == list(objects)
    for name, module in again.items():
        assert module is objects[name]
        assert (type(module), module.training) == (types[name], flags[name])
        assert sorted(vars(module)) == sorted(attributes[name]), name
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == tensors


@pytest.mark.parametrize(("to", "options"), TARGETS)
def test_twice_is_once(to: str, options: dict[str, Any]) -> None:
    model = syncnorm.convert(Net(), to, **options)
    syncnorm.revert(model)
    before = [(id(module), type(module)) for module in model.modules()]
    syncnorm.revert(model)
    assert [(id(module), type(module)) for module in model.modules()] == before


@pytest.mark.parametrize(("to", "options"), TARGETS)
@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_converted_model_go_back_too(to: str, options: dict[str, Any], through: Any) -> None:
    model = syncnorm.convert(Net(), to, **options)
    made = syncnorm.revert(through(model))
    assert [type(layer) for layer in (made.bn1, made.bn2, made.bn3)] == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
    assert made.bn1 is made.alias is made.inner[0]
    assert made.bn1.weight is not model.bn1.weight
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert not syncnorm.modules.is_synced(made.bn1)


@pytest.mark.parametrize(("to", "options"), TARGETS)
def test_what_was_learned_and_switched_meanwhile_stays(to: str, options: dict[str, Any]) -> None:
    model = syncnorm.convert(Net(), to, **options)
    with torch.no_grad():
        model.bn1.weight.fill_(7)
    model.bn1.eval()
    model.bn3.train()
    model.double()
    fired: list[str] = []
    handle = model.bn1.register_forward_hook(lambda *_: fired.append("hook"))
    syncnorm.revert(model)
    assert model.bn1.weight.eq(7).all()
    assert (model.bn1.training, model.bn3.training) == (False, True)
    assert model.bn1.running_var.dtype == torch.float64
    model.bn1(torch.randn(3, 4, dtype=torch.float64))
    assert fired == ["hook"]
    handle.remove()
    model.bn1(torch.randn(3, 4, dtype=torch.float64))
    assert fired == ["hook"]


@pytest.mark.parametrize(("to", "options"), [*TARGETS, ("rms_norm", {}), ("switchable_norm", {})])
def test_what_its_user_set_on_the_layer_in_its_place_stays(to: str, options: dict[str, Any]) -> None:
    layer = nn.BatchNorm2d(4, momentum=0.25)
    layer.kept, layer.dropped, layer.num_groups = "a", "b", "mine"  # type: ignore[assignment]
    fields = {*vars(layer)} - {"dropped"} | {"new"}
    model = syncnorm.convert(nn.Sequential(layer), to, **options)
    model[0].kept, model[0].new, model[0].eps = "c", "d", 0.5  # type: ignore[assignment]
    del model[0].dropped
    if hasattr(model[0], "momentum"):
        model[0].momentum = None  # type: ignore[assignment]
    momentum = getattr(model[0], "momentum", 0.25)
    model.compile(backend="eager")  # of the model, and of the layer: what is compiled is not the batch norm
    if to != "sync_batch_norm":
        model[0].compile(backend="eager")
    assert syncnorm.revert(model)[0] is layer
    assert (layer.kept, layer.new, layer.num_groups, layer.eps, layer.momentum) == ("c", "d", "mine", 0.5, momentum)
    assert {*vars(layer)} == fields


def test_numbers_of_another_meaning_are_not_brought_back() -> None:
    layer = nn.BatchNorm2d(4)
    model = syncnorm.convert(nn.Sequential(layer), "filter_response_norm", tlu=False)
    assert model[0].eps != layer.eps
    model[0].eps = 0.5  # type: ignore[assignment]
    syncnorm.revert(model)
    assert layer.eps == 1e-5


@pytest.mark.parametrize(("to", "options"), TARGETS)
def test_a_forward_that_was_replaced_on_the_object_is_not_pulled_from_under_it(
    to: str, options: dict[str, Any]
) -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), to, **options)
    inner, layer = model[0].forward, model[0]
    layer.forward = lambda x: inner(x)  # as hooks of accelerate do
    with pytest.raises(syncnorm.SyncNormError, match="changes the class of 0, and forward was replaced on the object"):
        syncnorm.revert(model)
    assert model[0] is layer
    del layer.forward
    assert type(syncnorm.revert(model)[0]) is nn.BatchNorm2d


def test_nor_is_that_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    syncnorm.convert(model, "group_norm", num_groups=2, weight_standardization=True)
    model[0].forward = model[0].forward
    with pytest.raises(syncnorm.SyncNormError, match="changes the class of 0, and forward was replaced on the object"):
        syncnorm.revert(model)
    assert type(model[1]) is syncnorm.GroupNorm


class Doubled(nn.Module):
    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return 2 * parameter


@pytest.mark.parametrize(
    ("to", "options"), [*TARGETS, ("group_norm", {"num_groups": 2, "weight_standardization": True})]
)
def test_a_layer_that_was_parametrized_since_is_not_broken(to: str, options: dict[str, Any]) -> None:
    model = syncnorm.convert(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), to, **options)
    for place, layer in enumerate(model):
        if type(layer) is not nn.Conv2d:
            torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
            with pytest.raises(
                syncnorm.SyncNormError, match=f"class of {place}, and it is parametrized.*Undo that first"
            ):
                syncnorm.revert(model)
            torch.nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    syncnorm.revert(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]
    model(torch.randn(2, 2, 5, 5))


def test_what_a_layer_was_given_since_is_not_lost_with_it() -> None:
    for give in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_buffer("more", torch.ones(1)),
    ):
        model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), "layer_norm")
        give(model[0])
        with pytest.raises(syncnorm.SyncNormError, match=r"class of 0, and it holds \['(more|weight_mask)'"):
            syncnorm.revert(model)
        assert type(model[0]) is syncnorm.GroupNorm


def test_the_staged_chain_loses_nothing() -> None:
    """Batch norm, batch renorm, frozen, and back: what each stage learned stays, what it switched is switched back."""
    layer = nn.BatchNorm2d(4, eps=1e-4, momentum=0.25)
    layer.bias.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.BatchNorm2d(4, momentum=None).eval())
    fields = {name: sorted(vars(module)) for name, module in model.named_modules()}
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    def steps() -> None:
        for _ in range(2):
            model(torch.randn(4, 3, 5, 5)).square().sum().backward()

    steps()
    syncnorm.convert(model, "batch_renorm", r_max=2.0)
    steps()
    learned = copy.deepcopy(model.state_dict())
    syncnorm.convert(model, "frozen_batch_norm")
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, False, False]
    steps()
    assert all(torch.equal(value, learned[name]) for name, value in model.state_dict().items())
    syncnorm.revert(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm2d]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]
    assert [module.training for module in model] == [True, True, False]
    assert (layer.eps, layer.momentum, layer.num_batches_tracked, model[2].momentum) == (1e-4, 0.25, 4, None)
    assert model[2].num_batches_tracked == 0
    assert all(torch.equal(value, learned[name]) for name, value in model.state_dict().items())
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == fields


def test_running_statistics_of_training_stay() -> None:
    model, plain = (nn.Sequential(nn.BatchNorm1d(4)) for _ in range(2))
    syncnorm.convert(model)
    x = torch.randn(8, 4) * 3 + 1
    model(x), plain(x)
    syncnorm.revert(model)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_half_precision_goes_back_to_what_torchs_layer_takes() -> None:
    for to in ("sync_batch_norm", "layer_norm"):
        model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), to).to(torch.bfloat16)
        layer = syncnorm.revert(model)[0]
        assert layer.running_mean.dtype == torch.bfloat16
        assert model(torch.randn(8, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["sync_batch_norm", "frozen_batch_norm", "layer_norm", "switchable_norm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_so_do_statistics_without_a_weight(to: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, affine=False))
    syncnorm.revert(syncnorm.convert(model.to(dtype), to))
    assert model[1].running_mean.dtype == model[1].running_var.dtype == dtype
    syncnorm.revert(syncnorm.convert(model, to).float())
    assert model[1].running_mean.dtype == model[1].running_var.dtype == torch.float32
    syncnorm.revert(syncnorm.convert(model, to).to(dtype))
    assert model[1].running_mean.dtype == model[1].running_var.dtype == dtype
    syncnorm.revert(syncnorm.convert(model, to).double())
    assert model[1].running_mean.dtype == model[1].running_var.dtype == torch.float64


def test_a_model_built_on_meta_gets_real_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, device="meta"))
    syncnorm.convert(model, "layer_norm")
    model.to_empty(device="cpu")
    layer = syncnorm.revert(model)[0]
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()
    assert layer.weight.device.type == "cpu"


@pytest.mark.parametrize(("to", "options"), [("rms_norm", {}), ("layer_norm", {"affine": False})])
def test_what_was_dropped_follows_the_model(to: str, options: dict[str, Any]) -> None:
    """A weight or bias that the replacement has not is no part of the model while that is cast or materialised."""
    for dtype in (torch.float64, torch.bfloat16):
        model = syncnorm.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), to, **options).to(dtype)
        layer = syncnorm.revert(model)[1]
        assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype, torch.int64}
        model(torch.randn(5, 3, dtype=dtype))
    model = syncnorm.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("meta"), to, **options)
    layer = syncnorm.revert(model.to_empty(device="cpu"))[1]
    assert layer.bias.eq(0).all() and layer.bias.requires_grad and (to == "rms_norm" or layer.weight.eq(1).all())


def test_a_layer_of_another_dtype_than_the_model_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.bfloat16), nn.BatchNorm1d(4))
    layer = syncnorm.revert(syncnorm.convert(model, "layer_norm", affine=False))[1]
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("to", "options"), [("sync_batch_norm", {"accumulate": 2}), ("batch_renorm", {}), ("batch_instance_norm", {})]
)
def test_what_is_converted_while_evaluating_can_be_trained(to: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(torch.bfloat16)
    x = torch.randn(5, 3, 2, 2, dtype=torch.bfloat16)
    for function, arguments in ((syncnorm.convert, (to,)), (syncnorm.revert, ())):
        with torch.inference_mode():
            function(model, *arguments, **(options if arguments else {}))
        model(x).float().square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model(x)


def test_layers_of_ours_become_plain_batch_norm() -> None:
    ours = [
        syncnorm.SyncBatchNorm1d(3),
        syncnorm.SyncBatchNorm2d(3),
        syncnorm.SyncBatchNorm3d(3),
        syncnorm.SyncBatchNorm(3),
    ]
    model = syncnorm.revert(nn.Sequential(*ours))
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm]
    assert type(syncnorm.revert(model, dim=2)[3]) is nn.BatchNorm2d


def test_torchs_sync_batch_norm() -> None:
    """Converted by us it comes back as it was, and stays; a foreign one becomes plain, with its tensors."""
    layer = nn.SyncBatchNorm(3)
    model = nn.Sequential(layer)
    syncnorm.revert(syncnorm.convert(model))
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is None
    assert type(syncnorm.revert(model)[0]) is nn.SyncBatchNorm
    assert type(syncnorm.revert(model, dim=3)[0]) is nn.BatchNorm3d

    foreign = nn.SyncBatchNorm(3).eval()
    weight = foreign.weight
    syncnorm.revert(nn.Sequential(foreign))
    assert type(foreign) is BatchNorm
    assert foreign.weight is weight
    assert not foreign.training
    assert "process_group" not in vars(foreign)
    assert foreign(torch.randn(2, 3, 4)).shape == (2, 3, 4)


def test_torchs_sync_batch_norm_that_was_replaced_comes_back() -> None:
    layer = nn.SyncBatchNorm(4)
    model = syncnorm.convert(nn.Sequential(layer), "group_norm", num_groups=2)
    assert syncnorm.revert(syncnorm.revert(model))[0] is layer
    assert type(layer) is nn.SyncBatchNorm


def test_both_conversions_after_another_are_undone() -> None:
    model = Net()
    layer = model.bn1
    syncnorm.convert(model)
    syncnorm.convert(model, "group_norm", num_groups=2)
    assert type(model.bn1) is syncnorm.GroupNorm
    syncnorm.revert(model)
    assert model.bn1 is layer
    assert type(layer) is nn.BatchNorm1d


def test_a_model_that_is_one_layer() -> None:
    layer = nn.BatchNorm2d(4)
    assert syncnorm.revert(syncnorm.convert(layer)) is layer
    norm = syncnorm.convert(layer, "layer_norm")
    assert type(norm) is syncnorm.GroupNorm
    assert syncnorm.revert(norm) is layer
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("dim", [0, 4, "2d", True])
def test_dim_must_be_a_number_of_dims(dim: Any) -> None:
    with pytest.raises(ValueError, match="dim must be 1, 2, 3 or None, got "):
        syncnorm.revert(nn.BatchNorm1d(2), dim=dim)
