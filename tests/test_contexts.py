"""Tier: no process. For a while without the ranks, or without the running statistics; exceptions and nesting included."""

import copy
from typing import Any, TypeVar, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.modules import BatchNorm, is_synced
from syncnorm.modules._statistics import LOCAL


class Own(nn.BatchNorm1d):
    """A forward that does not ask track_running_stats."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


LAYERS: list[Any] = [
    lambda: nn.BatchNorm1d(4),
    lambda: nn.BatchNorm1d(4, momentum=None),
    lambda: BatchNorm(4),
    lambda: nn.SyncBatchNorm(4),
    lambda: Own(4),
    lambda: nn.InstanceNorm1d(4, track_running_stats=True, affine=True),
    lambda: syncnorm.SyncBatchNorm1d(4),
    lambda: syncnorm.SyncBatchNorm1d(4, backend="reference"),
    lambda: syncnorm.SyncBatchNorm1d(4, backend="aten", momentum=None),
    lambda: syncnorm.SyncBatchNorm1d(4, accumulate=2),
]


@pytest.mark.parametrize("make", LAYERS)
def test_statistics_stay_and_values_are_the_same(make: Any) -> None:
    model, plain = nn.Sequential(make()), nn.Sequential(make())
    x, buffers = torch.randn(3, 4, 5) * 2 + 1, {name: id(b) for name, b in model.named_buffers()}
    before = copy.deepcopy(dict(model.named_buffers()))
    with syncnorm.no_stats_update(model) as same:
        assert same is model
        y = model(x)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    # With accumulate the layer walks and without statistics it leaves the work to torch: equal up to rounding.
    rounding = 1e-6 if getattr(model[0], "accumulate", 1) > 1 else 0
    torch.testing.assert_close(y, plain(x), rtol=0, atol=rounding)
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model(x)
    assert all(torch.equal(b, plain.get_buffer(name)) for name, b in model.named_buffers())
    moved = not torch.equal(plain[0].running_mean, before["0.running_mean"])
    assert moved == (getattr(plain[0], "accumulate", 1) == 1)


@pytest.mark.parametrize("make", LAYERS)
def test_evaluation_inside_uses_the_running_statistics(make: Any) -> None:
    model = nn.Sequential(make())
    for _ in range(2):
        model(torch.randn(3, 4, 5) + 2)
    x = torch.randn(3, 4, 5)
    exact = model.eval()(x)
    with syncnorm.no_stats_update(model):
        assert torch.equal(model(x), exact)


@pytest.mark.parametrize("make", LAYERS)
def test_gradients_flow_inside(make: Any) -> None:
    model, plain = nn.Sequential(make()), nn.Sequential(make())
    x = torch.randn(3, 4, 5, requires_grad=True)
    with syncnorm.no_stats_update(model):
        y = model(x)
    gradients = [torch.autograd.grad((out * out.detach().cos()).sum(), x)[0] for out in (y, plain(x))]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("make", LAYERS)
def test_an_exception_leaves_nothing_behind(make: Any) -> None:
    model = nn.Sequential(make())
    before = copy.deepcopy({name: value for name, value in vars(model[0]).items() if "hook" in name})
    flag, buffers = model[0].track_running_stats, dict(model.named_buffers())
    try:
        with syncnorm.no_stats_update(model):
            model(torch.zeros(3, 4, dtype=torch.int64))
    except (ValueError, RuntimeError, TypeError):
        failed = True
    assert failed
    assert model[0].track_running_stats is flag
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert {name: value for name, value in vars(model[0]).items() if "hook" in name} == before


def test_no_stats_update_nests() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Own(4))
    x, before = torch.randn(5, 4), [0, 0]
    with syncnorm.no_stats_update(model):
        with syncnorm.no_stats_update(model[0]):
            model(x)
        model(x)
        assert [int(layer.num_batches_tracked) for layer in model] == before
    model(x)
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 1]


def test_a_frozen_flag_stays_frozen() -> None:
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False
    with syncnorm.no_stats_update(layer):
        pass
    assert layer.track_running_stats is False


# disabled


def test_disabled_layers_have_a_group_of_one_and_come_back() -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), process_group="node")
    with syncnorm.disabled(model) as same:
        assert same is model
        assert model[0]._group() is LOCAL
        with syncnorm.disabled(model[0]):
            assert not model[0]._sync
        assert not model[0]._sync
    assert model[0]._sync
    assert model[1].process_group == "node"


def test_a_layer_reverted_inside_keeps_no_trace() -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    with syncnorm.disabled(model):
        syncnorm.revert(model)
    assert not is_synced(model[0])
    assert "_sync" not in vars(model[0])


@pytest.mark.parametrize("to", ["sync_batch_norm", "switchable_norm"])
def test_a_layer_reverted_inside_tracks_afterwards(to: str) -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), to)
    with syncnorm.no_stats_update(model):
        syncnorm.revert(model)
    assert model[0].track_running_stats is True


def test_disabled_layers_come_back_after_an_exception() -> None:
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="expected an input"), syncnorm.disabled(model):
        model(torch.zeros(3))
    assert model[0]._sync


def test_a_type_checker_knows_the_model_that_comes_back() -> None:
    for give in (syncnorm.convert, syncnorm.revert, syncnorm.SyncBatchNorm.convert_sync_batchnorm):
        taken, *_, given = get_type_hints(give).values()
        assert isinstance(given, TypeVar) and taken is given
    for context in (syncnorm.disabled, syncnorm.no_stats_update, syncnorm.join):
        taken, *_, given = get_type_hints(context).values()
        assert get_args(given) == (taken,) and isinstance(taken, TypeVar)
