"""Tier: no process and gloo ranks. Between the families of batch statistics a layer only changes its class, and back."""

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm.modules import (
    BatchRenorm2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    GhostBatchNorm2d,
    MovingAverageBatchNorm2d,
    SyncBatchNorm2d,
)
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import my_slice, randomise_affine, whole_batch

STAGES = [
    ("batch_renorm", {"r_max": 2.0, "d_max": 1.0}, BatchRenorm2d),
    ("ghost_batch_norm", {"virtual_batch_size": 2}, GhostBatchNorm2d),
    ("frozen_batch_norm", {}, FrozenBatchNorm2d),
    ("moving_average_batch_norm", {"window": 3, "warmup": 0, "r_max": 2.0}, MovingAverageBatchNorm2d),
    ("sync_batch_norm", {}, SyncBatchNorm2d),
]


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-4, momentum=0.2), nn.ReLU(), nn.BatchNorm2d(4))
    randomise_affine(net)
    net[1].bias.requires_grad_(False)
    net[3].eval()
    return net


def snapshot(net: nn.Module) -> dict[str, object]:
    kept: dict[str, object] = {f"id {name}": id(value) for name, value in net.state_dict(keep_vars=True).items()}
    for name, module in net.named_modules():
        fields = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        kept[name] = (type(module), module.training, sorted(fields), sorted(module._buffers), module.extra_repr())
    return kept | {f"grad {name}": p.requires_grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("first", range(len(STAGES)))
@pytest.mark.parametrize("second", range(len(STAGES)))
def test_every_path_leads_back(first: int, second: int) -> None:
    net = model()
    before = snapshot(net)
    for to, options, expected in (STAGES[first], STAGES[second]):
        assert syncnorm.convert(net, to=to, **options) is net
        assert type(net[1]) is type(net[3]) is expected
        assert (net[1].eps, net[1].momentum, net[3].training) == (1e-4, 0.2, False)
        assert {f"id {name}": id(v) for name, v in net.state_dict(keep_vars=True).items()}.items() <= before.items()
        net(torch.randn(4, 3, 6, 6))
    syncnorm.revert(net)
    assert snapshot(net) == before


def test_settings_of_a_family_change_in_place_and_are_idempotent() -> None:
    net = syncnorm.convert(model(), to="batch_renorm")
    assert (net[1].r_max, net[1].d_max) == (3.0, 5.0)
    syncnorm.convert(net, to="batch_renorm", r_max=1.5)
    assert (net[1].r_max, net[1].d_max) == (1.5, 5.0)
    assert {entry.action for entry in syncnorm.plan(net, to="batch_renorm").entries} == {"keep"}


@pytest.mark.parametrize("to", ["batch_renorm", "frozen_batch_norm", "group_norm"])
def test_what_sync_batch_norm_alone_can_do_is_said_to_be_dropped_and_is(to: str) -> None:
    net = nn.Sequential(syncnorm.SyncBatchNorm2d(32, accumulate=2, on_nonfinite="raise", memory_efficient=True))
    (entry,) = syncnorm.plan(net, to).entries
    assert "accumulate=2 dropped; memory_efficient=True dropped; on_nonfinite='raise' dropped" in entry.reason
    syncnorm.convert(net, to)
    assert getattr(net[0], "accumulate", 1) == 1 and "_pending" not in net[0]._buffers
    assert "accumulate" not in repr(net) and not syncnorm.inspect(net).rows[0].notes[1:]
    syncnorm.convert(syncnorm.revert(net), "batch_renorm")
    syncnorm.convert(net, accumulate=3)
    assert net[0].accumulate == 3 and net[0]._pending.numel() == 2 * 32 + 2


def test_options_and_layers_that_do_not_fit_are_refused_or_named() -> None:
    with pytest.raises(TypeError, match="to='ghost_batch_norm' needs virtual_batch_size=n"):
        syncnorm.convert(model(), to="ghost_batch_norm")
    with pytest.raises(ValueError, match=r"r_max must be at least 1 .*, got 0\.5"):
        syncnorm.convert(model(), to="batch_renorm", r_max=0.5)
    with pytest.raises(TypeError, match="takes the options"):
        syncnorm.convert(model(), to="frozen_batch_norm", r_max=2.0)
    with pytest.warns(UserWarning, match="SyncBatchNorm has no counterpart in batch_renorm"):
        syncnorm.convert(nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4)), to="batch_renorm")


@pytest.mark.parametrize("to", ["batch_renorm", "frozen_batch_norm", "moving_average_batch_norm"])
def test_a_layer_without_running_statistics_is_left_where_they_are_needed(to: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.warns(UserWarning, match=f"BatchNorm2d \\(1\\): it has no running statistics, which {to} needs"):
        syncnorm.convert(model, to)
    assert type(model[1]) is nn.BatchNorm2d and type(model[0]) is not nn.BatchNorm2d
    model(torch.randn(3, 4, 2, 2))


def test_frozen_computes_torchs_evaluation_in_every_mode_and_moves_nothing() -> None:
    plain = nn.BatchNorm2d(3)
    randomise_affine(plain)
    plain(torch.randn(8, 3, 4, 4) * 2 + 1)
    frozen = syncnorm.convert(nn.Sequential(plain), to="frozen_batch_norm")[0]
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = frozen.train()(x)
    exact = nn.functional.batch_norm(
        x, before["running_mean"], before["running_var"], before["weight"], before["bias"], False, 0.0, plain.eps
    )
    assert torch.equal(y, exact)
    assert torch.equal(y, frozen.eval()(x))
    y.sum().backward()
    scale = before["weight"] / (before["running_var"] + plain.eps).sqrt()
    torch.testing.assert_close(x.grad, scale.view(1, 3, 1, 1).expand_as(x))
    assert frozen.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_a_fresh_frozen_layer_is_the_identity_and_takes_one_value() -> None:
    x = torch.randn(1, 5)
    torch.testing.assert_close(FrozenBatchNorm1d(5)(x), x, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in FrozenBatchNorm1d(5).parameters())
    with pytest.raises(
        ValueError, match=r"FrozenBatchNorm1d\(5\): expected 5 channels in dim 1, got an input \[1, 4\]"
    ):
        FrozenBatchNorm1d(5)(torch.randn(1, 4))


def _frozen_over_ranks(splits: list[int]) -> float:
    ours, whole, part = (
        FrozenBatchNorm2d(3, dtype=torch.float64),
        nn.BatchNorm2d(3, dtype=torch.float64),
        my_slice(splits),
    )
    x, loss_weight = whole_batch((sum(splits), 3, 4, 5))
    randomise_affine(whole)
    whole(x * 2 + 1)
    ours.load_state_dict(whole.eval().state_dict())
    found = []
    with count_collectives() as counts:
        for layer, mine in ((ours.train(), x[part]), (whole, x)):
            mine = mine.clone().requires_grad_()
            y = layer(mine)
            (dx,) = torch.autograd.grad((y.pow(3) * (loss_weight[part] if layer is ours else loss_weight)).sum(), mine)
            found.append(torch.stack([y.detach(), dx]))
    assert not counts
    exact = found[1][:, part]
    return float((found[0] - exact).abs().max() / exact.abs().max()) if exact.numel() else 0.0


@pytest.mark.gloo
def test_frozen_meets_nobody_and_its_shares_are_those_of_one_process() -> None:
    assert max(run_ranks(_frozen_over_ranks, 3, [5, 0, 3])) <= 1e-12


def test_half_models_keep_their_frozen_statistics() -> None:
    net = syncnorm.convert(model(), to="frozen_batch_norm").bfloat16()
    y = net(torch.randn(2, 3, 6, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert net[1].running_var.dtype == torch.float32
