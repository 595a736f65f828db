"""Tier: no process. Batch norms that do more are taught, by class or by a name that nobody has to import."""

import copy
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import syncnorm
from syncnorm.conversion import _adapters
from syncnorm.modules import TARGETS, SyncStatistics


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class SyncBatchNormReLU(SyncStatistics, BatchNormReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.fixture(autouse=True)
def forget_what_was_taught() -> Iterator[None]:
    before = [dict(known) for known in (TARGETS, _adapters._NAMED)]
    yield
    for known, old in zip((TARGETS, _adapters._NAMED), before, strict=True):
        known.clear()  # type: ignore[attr-defined]
        known.update(old)  # type: ignore[attr-defined, arg-type]


def here(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def teach_by_class() -> None:
    syncnorm.register_adapter(BatchNormReLU, SyncBatchNormReLU)


def teach_by_name() -> None:
    syncnorm.register_adapter(here(BatchNormReLU), SyncBatchNormReLU)


def teach_by_function() -> None:
    syncnorm.register_adapter(here(BatchNormReLU), lambda source: SyncBatchNormReLU)


@pytest.mark.parametrize("teach", [teach_by_class, teach_by_name, teach_by_function])
def test_a_taught_layer_keeps_its_behaviour(teach: Any) -> None:
    layer = BatchNormReLU(4)
    model, plain = nn.Sequential(layer), nn.Sequential(BatchNormReLU(4))
    assert syncnorm.plan(model).counts["skip"] == 1
    teach()
    syncnorm.convert(model, strict=True, backend="reference")
    assert type(layer) is SyncBatchNormReLU
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(layer.running_var, plain[0].running_var)
    assert model(x).min() == 0
    assert type(copy.deepcopy(layer)) is type(pickle.loads(pickle.dumps(layer))) is SyncBatchNormReLU
    assert type(syncnorm.revert(model)[0]) is BatchNormReLU


def test_a_taught_layer_made_directly_reverts_to_its_source() -> None:
    teach_by_class()
    assert type(syncnorm.revert(SyncBatchNormReLU(4))) is BatchNormReLU


def test_only_the_exact_class_is_taught() -> None:
    class Further(BatchNormReLU):
        """More of its own."""

    teach_by_class()
    assert syncnorm.plan(Further(3)).counts["skip"] == 1


def test_a_taught_layer_is_not_replaced_by_another_norm() -> None:
    teach_by_class()
    for layer in (BatchNormReLU(4), syncnorm.convert(BatchNormReLU(4))):
        (entry,) = syncnorm.plan(layer, "group_norm").entries
        assert entry.action == "skip"
        assert "does more than batch norm, which group_norm would lose" in entry.reason


def test_what_cannot_be_an_adapter() -> None:
    with pytest.raises(TypeError, match=r"must subclass both BatchNormReLU and syncnorm\.modules\.SyncStatistics"):
        syncnorm.register_adapter(BatchNormReLU, syncnorm.SyncBatchNorm2d)
    with pytest.raises(TypeError, match="register_adapter takes a class and the class that takes its place"):
        syncnorm.register_adapter(BatchNormReLU, lambda source: SyncBatchNormReLU)
    with pytest.raises(ValueError, match=r"a source given by name must be dotted, .* got 'BatchNorm'"):
        syncnorm.register_adapter("BatchNorm", SyncBatchNormReLU)
    syncnorm.register_adapter(here(BatchNormReLU), lambda source: syncnorm.SyncBatchNorm2d)
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNormReLU(3))
    with pytest.raises(TypeError, match="the target must subclass both"):
        syncnorm.convert(model)
    assert type(model[0]) is nn.BatchNorm2d


# timm


def timm_batch_norm_act() -> Any:
    try:
        from timm.layers.norm_act import BatchNormAct2d
    except Exception as error:  # timm imports torchvision, which need not fit the installed torch
        pytest.skip(f"timm cannot be imported: {error!r}")
    return BatchNormAct2d


class _Replica(nn.BatchNorm2d):
    """The fields and the order of timm's layer: batch norm, then drop, then an activation in place."""

    def __init__(self, num_features: int, drop: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class under timm's dotted name."""
    for name in ("timm", "timm.layers", "timm.layers.norm_act"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    replica = type("BatchNormAct2d", (_Replica,), {"__module__": "timm.layers.norm_act"})
    sys.modules["timm.layers.norm_act"].BatchNormAct2d = replica  # type: ignore[attr-defined]
    return replica


def check_batch_norm_act(cls: Any) -> None:
    model, plain = nn.Sequential(cls(4)), nn.Sequential(cls(4))
    syncnorm.convert(model, strict=True, backend="reference")
    assert type(model[0]).__name__ == "SyncBatchNormAct2d"
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y, exact = model(x), plain(x)
    torch.testing.assert_close(y, exact)
    assert y.min() == 0
    grads = [
        torch.autograd.grad((out * out.detach().cos()).sum(), [x, net[0].weight])
        for out, net in ((y, model), (exact, plain))
    ]
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    assert type(copy.deepcopy(model)[0]) is type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])
    with pytest.raises(ValueError, match="SyncBatchNormAct2d"):
        model(torch.randn(3, 4))
    assert type(syncnorm.revert(model)[0]) is cls


def test_timms_layer_keeps_its_activation() -> None:
    check_batch_norm_act(timm_batch_norm_act())


def test_a_layer_of_timms_name_and_fields_keeps_its_activation(replica: Any) -> None:
    check_batch_norm_act(replica)


def test_drop_comes_before_the_activation(replica: Any) -> None:
    class Minus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    model, plain = (nn.Sequential(replica(4, Minus())) for _ in range(2))
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(syncnorm.convert(model)(x), plain(x))


def test_nothing_is_imported_because_an_adapter_names_it() -> None:
    code = "import sys, syncnorm, torch; syncnorm.convert(torch.nn.BatchNorm1d(2)); print('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
