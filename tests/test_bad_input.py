"""Tier: gloo ranks. What cannot be normalised is one clear error on every rank, with nothing half done and nobody waiting."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import syncnorm
from syncnorm.functional import ghost_batch_norm, masked_batch_norm, sync_batch_norm
from syncnorm.kernels import native
from syncnorm.kernels.native import _build, among
from syncnorm.modules import EvoNormB0, SwitchableNorm2d
from syncnorm.testing import run_ranks

CASES: dict[str, tuple[Any, str]] = {
    "channels": (
        torch.randn(4, 5, 2, 2),
        r"SyncBatchNorm2d\(3\): expected 3 channels in dim 1, got an input \[4, 5, 2, 2\]\.$",
    ),
    "channels last": (torch.randn(4, 2, 2, 3), r"The channels seem to be last: use x\.movedim\(-1, 1\)"),
    "rank of input": (torch.randn(4, 3), r"expected an input \[N, C, \*\] of 4 dims, got \[4, 3\]"),
    "integers": (
        torch.ones(4, 3, 2, 2, dtype=torch.int64),
        r"expected a floating-point input, got torch\.int64.*input\.float\(\)",
    ),
}


def test_constructor_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"eps must be positive, got -1e-05"):
        syncnorm.SyncBatchNorm2d(3, eps=-1e-5)
    with pytest.raises(
        ValueError, match=r"backend must be one of \['auto', 'native', 'aten', 'triton', 'reference'\], got 'cuda'"
    ):
        syncnorm.SyncBatchNorm2d(3, backend="cuda")
    with pytest.raises(ValueError, match=r"accumulate is a number of micro-batches, at least 1; got 0"):
        syncnorm.SyncBatchNorm2d(3, accumulate=0)
    with pytest.raises(ValueError, match=r"the number of ranks per group, at least 1; got 0"):
        syncnorm.SyncBatchNorm2d(3, process_group=0)
    with pytest.raises(ValueError, match=r'must be "world" or "node", got \'all\''):
        syncnorm.SyncBatchNorm2d(3, process_group="all")
    with pytest.raises(TypeError, match=r"a ProcessGroup or a DeviceMesh, got dict"):
        syncnorm.SyncBatchNorm2d(3, process_group={})


def test_functions_take_no_option_that_would_have_no_effect() -> None:
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    pending = torch.zeros(8, dtype=torch.float64)
    for normalize in (sync_batch_norm, functools.partial(masked_batch_norm, mask=torch.ones(4))):
        with pytest.raises(ValueError, match=r"accumulate=4 gathers micro-batches in pending, which is None"):
            normalize(x, running_mean=mean, running_var=var, training=True, accumulate=4)
        with pytest.raises(ValueError, match=r"accumulate is a number of micro-batches, at least 1; got 0"):
            normalize(x, running_mean=mean, running_var=var, training=True, pending=pending, accumulate=0)
    with pytest.raises(ValueError, match=r"virtual_batch_size is a number of samples, at least 1; got 0"):
        ghost_batch_norm(x, mean, var, 0, training=True)
    assert not mean.any() and not pending.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_one_process_refuses_and_changes_nothing(case: str, training: bool) -> None:
    layer = syncnorm.SyncBatchNorm2d(3).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x, message = CASES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_eps_zero_is_refused_when_training_as_in_torch() -> None:
    layer = syncnorm.SyncBatchNorm2d(3, eps=0.0)
    with pytest.raises(ValueError, match=r"eps must be positive when training, got 0\.0"):
        layer(torch.randn(4, 3, 2, 2))
    theirs = nn.BatchNorm2d(3, eps=0.0).eval()
    x = torch.randn(4, 3, 2, 2)
    try:
        expected = theirs(x)
    except ValueError:  # torch 2.11 refuses it in evaluation, too
        with pytest.raises(ValueError, match="eps must be positive"):
            layer.eval()(x)
    else:
        assert torch.equal(layer.eval()(x), expected)


def test_one_value_in_one_process() -> None:
    layer = syncnorm.SyncBatchNorm1d(3)
    with pytest.raises(
        ValueError,
        match=r"SyncBatchNorm1d\(3\): expected more than 1 value per channel when training, got an input \[1, 3\]",
    ):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0 and layer.running_mean.tolist() == [0, 0, 0]


def _refusals(case: str, who: str) -> tuple[str, str, float, list[str]]:
    layer = syncnorm.SyncBatchNorm2d(3)
    layer(torch.randn(2, 3, 2, 2))  # the group works
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bad = who == "all" or dist.get_rank() == 1
    start = time.monotonic()
    try:
        layer(CASES[case][0] if bad else torch.randn(2, 3, 2, 2))
        outcome = ("none", "")
    except Exception as error:
        outcome = (type(error).__name__, str(error))
    seconds = time.monotonic() - start
    changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
    layer(torch.randn(2, 3, 2, 2))  # and still works
    return *outcome, seconds, changed


@pytest.mark.gloo
@pytest.mark.parametrize("who", ["all", "one"])
@pytest.mark.parametrize("case", CASES)
def test_no_rank_is_left_waiting(case: str, who: str) -> None:
    per_rank = run_ranks(_refusals, 2, case, who)
    for rank, (kind, message, seconds, changed) in enumerate(per_rank):
        assert seconds < 5 and not changed
        if who == "all" or rank == 1:
            assert kind in ("ValueError", "TypeError")
        else:
            assert kind == "SyncNormMismatch" and "1 of 2 ranks refused their input to this call" in message


def _ghosts(size: int) -> Callable[[int], nn.Module]:
    return functools.partial(syncnorm.GhostBatchNorm1d, virtual_batch_size=size)


def _backend_of_one(make: Any) -> tuple[str, str, list[str]]:
    os.environ.pop("TRITON_INTERPRET", None)
    layer, x = make(3), torch.randn(4, 3)
    if isinstance(layer, syncnorm.GhostBatchNorm1d):
        layer(x)  # ranks agree on their ghosts
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.backend = "triton" if dist.get_rank() else "auto"
    with pytest.raises(syncnorm.SyncNormError) as caught:
        layer(x)
    changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
    layer.backend = "auto"
    layer(x)
    return type(caught.value).__name__, str(caught.value), changed


@pytest.mark.gloo
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(syncnorm.SyncBatchNorm1d, id="SyncBatchNorm1d"),
        pytest.param(syncnorm.BatchRenorm1d, id="BatchRenorm1d"),
        pytest.param(syncnorm.MovingAverageBatchNorm1d, id="MovingAverageBatchNorm1d"),
        pytest.param(_ghosts(2), id="ghosts of a rank"),
        pytest.param(_ghosts(8), id="a ghost of two ranks"),
    ],
)
def test_a_backend_that_refuses_on_one_rank_is_told_to_the_others(make: Any) -> None:
    first, second = run_ranks(_backend_of_one, 2, make)
    assert first[0] == "SyncNormMismatch" and "1 of 2 ranks refused their input to this call (ranks [1]" in first[1]
    assert second[0] == "SyncNormError" and "backend='triton' was asked for and cannot run" in second[1]
    assert first[2] == second[2] == []


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "sync batch norm": lambda: syncnorm.SyncBatchNorm2d(3),
    "the walk of several calls": lambda: syncnorm.SyncBatchNorm2d(3, on_nonfinite="raise"),
    "batch renorm": lambda: syncnorm.BatchRenorm2d(3),
    "moving averages": lambda: syncnorm.MovingAverageBatchNorm2d(3),
    "ghosts of a rank": lambda: syncnorm.GhostBatchNorm2d(3, 2),
    "a ghost of two ranks": lambda: syncnorm.GhostBatchNorm2d(3, 8),
    "masked": lambda: _Masked(),
    "switchable": lambda: SwitchableNorm2d(3),
    "evo norm": lambda: EvoNormB0(3),
}


class _Masked(syncnorm.SyncBatchNorm2d):
    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input, mask=torch.ones(input.size(0)))


def _failure_of_one(where: str, check: str, families: list[str]) -> list[tuple[str, list[str]]]:
    syncnorm.set_check(check)
    told = []
    for layer in (FAMILIES[family]() for family in families):
        x = torch.randn(4, 3, 2, 2, requires_grad=True)
        layer(x)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        inner = x * 1.0
        # Floating point, which is all that can be said of it before it is computed with.
        shard = x.detach().to(torch.float8_e4m3fn) if where == "forward" and dist.get_rank() else inner
        if where == "forward":
            with pytest.raises(RuntimeError) as caught:
                layer(shard)
        else:
            loss = layer(shard).square().sum()
            before = {name: value.clone() for name, value in layer.state_dict().items()}
            if dist.get_rank():
                inner.detach().add_(1)  # what the backward needs is gone
            with pytest.raises(RuntimeError) as caught:
                loss.backward()
        changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
        told.append((f"{type(caught.value).__name__} {caught.value}", changed))
        layer(x).sum().backward()  # nobody is out of step
    return told


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("where", "check", "families"),
    [
        ("forward", "inline", list(FAMILIES)),
        ("forward", "off", ["sync batch norm", "batch renorm", "switchable"]),
        ("backward", "inline", list(FAMILIES)[:4]),
    ],
)
def test_what_fails_on_one_rank_before_ranks_meet_is_told_to_the_others(
    where: str, check: str, families: list[str]
) -> None:
    per_rank = run_ranks(_failure_of_one, 2, where, check, families, group_timeout=10.0)
    for family, (first, changed), (second, changed_too) in zip(families, *per_rank, strict=True):
        assert first.startswith("SyncNormMismatch") and "1 of 2 ranks refused their input to this call" in first, family
        assert check == "off" or "(ranks [1], at " in first
        assert where == "forward" or "modified by an inplace operation" in second
        assert "SyncNorm" not in second and changed == changed_too == []


def _long_row_fails() -> str:
    layer, x = syncnorm.SyncBatchNorm1d(3000, backend="native"), torch.randn(3, 3000)
    layer(x)
    if dist.get_rank():
        among.batch_forward_row = _no_memory
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    return str(caught.value)


def _no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("not enough memory")


@pytest.mark.gloo
@pytest.mark.skipif(_build.compiler() is None, reason="needs a C++ compiler")
def test_a_rank_that_cannot_make_its_long_row_tells_the_others() -> None:
    native.build()
    first, second = run_ranks(_long_row_fails, 2, group_timeout=10.0)
    assert "1 of 2 ranks refused their input to this call" in first and second == "not enough memory"


def _distributed_input() -> str:
    x = distribute_tensor(torch.randn(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
    layer = syncnorm.SyncBatchNorm1d(3)
    with pytest.raises(TypeError) as caught:
        layer(x)
    layer(x.to_local())
    return str(caught.value)


@pytest.mark.gloo
def test_a_dtensor_is_refused_with_what_to_do() -> None:
    for text in run_ranks(_distributed_input, 2):
        assert "got a DTensor [4, 3]. Give the layer input.to_local(), of shards along dim 0" in text


@pytest.mark.gloo
def test_an_unknown_activation_of_one_rank_is_told_to_the_others() -> None:
    first, second = run_ranks(_activation_of_one, 2)
    assert "1 of 2 ranks refused their input to this call" in first
    assert second.startswith("activation must be None or one of ")


def _activation_of_one() -> str:
    with pytest.raises((ValueError, syncnorm.SyncNormMismatch)) as caught:
        sync_batch_norm(torch.randn(4, 3), None, None, training=True, activation="tan" if dist.get_rank() else "relu")
    return str(caught.value)


def _one_value() -> tuple[str, list[str]]:
    layer = syncnorm.SyncBatchNorm1d(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    try:
        layer(torch.randn(1 if dist.get_rank() == 1 else 0, 3))
        message = "none"
    except ValueError as error:
        message = str(error)
    return message, [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.gloo
def test_one_value_in_the_whole_group_is_the_same_error_on_every_rank() -> None:
    for rank, (message, changed) in enumerate(run_ranks(_one_value, 3)):
        assert "expected more than 1 value per channel in the whole group when training, got 1" in message
        assert f"this rank's input is [{int(rank == 1)}, 3]" in message and "to='group_norm'" in message
        assert not changed


def _two_values() -> list[list[float]]:
    layer = syncnorm.SyncBatchNorm1d(1)
    return layer(torch.full((1, 1), float(dist.get_rank()))).tolist()


@pytest.mark.gloo
def test_one_value_per_rank_is_enough() -> None:
    low, high = (values[0][0] for values in run_ranks(_two_values, 2))
    assert low == pytest.approx(-1, abs=1e-4) and high == pytest.approx(1, abs=1e-4)
