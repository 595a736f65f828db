"""Tier: no process, and gloo ranks. NaN and infinity: let through, kept from the running statistics, or named."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.errors import SyncNormNonFinite
from syncnorm.testing import run_ranks


def bad(value: float = torch.nan, channels: tuple[int, ...] = (1,)) -> Tensor:
    x = torch.randn(4, 3, 5)
    x[0, list(channels), 2] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_skip_update_keeps_the_statistics_and_nothing_else(value: float, compiled: bool) -> None:
    layer, torchs = syncnorm.SyncBatchNorm1d(3, on_nonfinite="skip_update"), nn.BatchNorm1d(3)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    good = torch.randn(4, 3, 5)
    for x in (good, bad(value), good):
        y, exact = run(x), torchs(x)
        torch.testing.assert_close(y, exact, equal_nan=True)
    clean = nn.BatchNorm1d(3)
    clean(good), clean(good)
    for name, buffer in clean.named_buffers():
        torch.testing.assert_close(dict(layer.named_buffers())[name], buffer)
    assert not torchs.running_var.isfinite().all()


def test_raise_names_the_channels_before_anything_is_changed() -> None:
    layer = syncnorm.SyncBatchNorm1d(3, on_nonfinite="raise")
    layer(torch.randn(4, 3, 5))
    before = [b.clone() for b in layer.buffers()]
    with pytest.raises(
        SyncNormNonFinite, match=r"SyncBatchNorm1d\(3\): .* not finite: rank 0: channels \[0, 2\]\."
    ) as caught:
        layer(bad(channels=(0, 2)))
    assert caught.value.ranks == {0: [0, 2]}
    assert all(a.equal(b) for a, b in zip(layer.buffers(), before, strict=True))
    with pytest.raises(RuntimeError, match="not finite"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(bad())
    assert layer.eval()(bad()).isnan().any()


def test_propagate_is_what_torch_does() -> None:
    layer, exact, x = syncnorm.SyncBatchNorm1d(3), nn.BatchNorm1d(3), bad()
    assert layer(x).isnan().equal(exact(x).isnan())
    assert layer.running_var.isnan().equal(exact.running_var.isnan())


def test_options() -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of \['propagate', 'skip_update', 'raise'\]"):
        syncnorm.SyncBatchNorm1d(3, on_nonfinite="stop")
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))
    assert syncnorm.convert(model, on_nonfinite="raise")[1].on_nonfinite == "raise"
    assert "on_nonfinite=raise" in repr(model[1])
    syncnorm.convert(model, to="batch_renorm")
    assert model[1].on_nonfinite == "propagate"
    assert "on_nonfinite" not in vars(syncnorm.revert(model)[1])


def _one_rank_is_bad(policy: str, masked: bool) -> tuple[str, str, bool]:
    rank = dist.get_rank()
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), on_nonfinite=policy)[0]
    torch.manual_seed(rank)
    options = {"mask": torch.ones(4, dtype=torch.bool)} if masked else {}
    kind = text = ""
    try:
        layer(bad(channels=(0, 1)) if rank == 1 else torch.randn(4, 3, 5), **options)
    except SyncNormNonFinite as error:
        kind, text = str(error.ranks), str(error)
    layer(torch.randn(4, 3, 5), **options)
    return kind, text, bool(torch.cat([layer.running_mean, layer.running_var]).isfinite().all())


@pytest.mark.gloo
@pytest.mark.parametrize("masked", [False, True])
def test_every_rank_raises_and_names_the_one(masked: bool) -> None:
    for kind, text, finite in run_ranks(_one_rank_is_bad, 3, "raise", masked):
        assert kind == "{1: [0, 1]}" and "rank 1: channels [0, 1]" in text
        assert finite
    assert [finite for *_, finite in run_ranks(_one_rank_is_bad, 2, "skip_update", masked)] == [True, True]
    assert [finite for *_, finite in run_ranks(_one_rank_is_bad, 2, "propagate", masked)] == [False, False]
