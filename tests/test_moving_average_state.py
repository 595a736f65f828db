"""Tier: no process. Moving average batch norm in its family: checkpoints, copies, class swaps, options; and digits."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncnorm
from syncnorm.modules import FAMILIES, BatchRenorm2d, MovingAverageBatchNorm1d, MovingAverageBatchNorm2d
from tests.oracles import randomise_affine
from tests.test_moving_average_batch_norm import data, make, train


def test_beyond_the_warm_up_the_unclipped_output_is_evaluation_before_the_update() -> None:
    layer = make(warmup=0, r_max=1e9)
    for step in range(3):
        x, _ = data(step, (2, 3, 4, 5))
        evaluated = layer.eval()(x)
        torch.testing.assert_close(layer.train()(x), evaluated, rtol=1e-12, atol=1e-12)


def test_batch_norm_checkpoints_go_both_ways_and_evaluate_alike() -> None:
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    randomise_affine(plain)
    for step in range(200):
        plain(data(step % 3, (4, 3, 4, 5))[0])
    layer = MovingAverageBatchNorm2d(3, dtype=torch.float64)
    layer.load_state_dict(plain.state_dict())
    x, dy = data(0, (2, 3, 4, 5))
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    # Training goes on about the checkpoint's mean, and as warmed up: within r_max, this is what evaluation gives.
    torch.testing.assert_close(layer.train()(x), plain(x), rtol=1e-12, atol=1e-12)
    train(layer, x, dy)
    assert torch.equal(layer.running_mean, plain.running_mean)
    back = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    back.load_state_dict(layer.state_dict())
    assert torch.equal(back(x), layer.eval()(x))


def test_it_folds_into_a_convolution() -> None:
    conv = nn.Conv2d(3, 3, 3, dtype=torch.float64)
    layer = make()
    x, _ = data(0, (2, 3, 5, 6))
    layer(conv(x))
    folded = fuse_conv_bn_eval(conv.eval(), layer.eval())
    torch.testing.assert_close(folded(x), layer(conv(x)), rtol=1e-12, atol=1e-12)


def test_copies_go_on_exactly_and_a_state_dict_starts_its_windows_anew() -> None:
    layer = make()
    for step in range(6):
        train(layer, *data(step, (2, 3, 4, 5)))
    restarted = make()
    restarted.load_state_dict(layer.state_dict())
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    step = data(6, (2, 3, 4, 5))
    want = train(layer, *step)
    for twin in twins:
        got = train(twin, *step)
        assert all(torch.equal(got[name], want[name]) for name in want)
    alone = make(window=1)  # what the first step after a restart knows
    alone.load_state_dict(twins[0].state_dict())
    alone.running_var.copy_(restarted.running_var)
    alone.num_batches_tracked.copy_(restarted.num_batches_tracked)
    got, want = train(restarted, *step), train(alone, *step)
    assert all(torch.equal(got[name], want[name]) for name in want)
    layer.reset_running_stats()
    assert not layer._squares.any() and not layer._slopes.any() and not layer.running_mean.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once_and_keeps_its_windows_wide(dtype: torch.dtype) -> None:
    layer = make()
    x, dy = (t.to(dtype) for t in data(0, (2, 3, 4, 5)))
    exact = train(copy.deepcopy(layer), x.double(), dy.double())
    mine = train(layer.float(), x, dy)
    for name in ("y", "dx"):
        assert mine[name].dtype == dtype
        error = float((mine[name].double() - exact[name]).abs().max())
        assert error <= 4 * torch.finfo(dtype).eps * float(exact[name].abs().max()), name
    layer.to(dtype)
    assert layer._squares.dtype == layer._slopes.dtype == torch.float64


def test_a_layer_comes_and_goes_by_its_class_alone() -> None:
    plain = nn.BatchNorm2d(4, eps=1e-4, momentum=0.2)
    plain(torch.randn(3, 4, 5, 5))
    kept = {id(value) for value in plain.state_dict(keep_vars=True).values()}
    fields = sorted(vars(plain)), sorted(plain._buffers), repr(plain)
    assert FAMILIES["moving_average_batch_norm"][nn.BatchNorm2d] is MovingAverageBatchNorm2d
    layer = MovingAverageBatchNorm2d.adopt(plain, window=5, warmup=7)
    assert layer is plain and (layer.eps, layer.momentum, layer.family) == (1e-4, 0.2, "moving_average_batch_norm")
    assert layer.settings().items() >= {"window": 5, "warmup": 7, "r_max": 5.0}.items()
    assert "window=5, warmup=7, r_max=5" in repr(layer)
    layer(torch.randn(3, 4, 5, 5))
    MovingAverageBatchNorm2d.adopt(layer, r_max=2.0)
    assert (layer.window, layer.warmup, layer.r_max) == (5, 7, 2.0) and layer._squares.any()
    MovingAverageBatchNorm2d.adopt(layer, window=3)
    assert layer.window == 3 and not layer._squares.any()
    BatchRenorm2d.adopt(layer)
    assert type(layer) is BatchRenorm2d and "_squares" not in layer._buffers
    MovingAverageBatchNorm2d.adopt(layer)(torch.randn(3, 4, 5, 5)).sum().backward()
    layer.release()
    assert type(plain) is nn.BatchNorm2d
    assert {id(value) for value in plain.state_dict(keep_vars=True).values()} == kept
    assert (sorted(vars(plain)), sorted(plain._buffers), repr(plain)) == fields


def test_calibration_measures_about_the_centre() -> None:
    layer = make(kind=MovingAverageBatchNorm1d)
    for step in range(5):
        train(layer, *data(step, (4, 3)))
    centre = layer.running_mean.clone()
    x = data(9, (30, 3))[0] * 2
    square = (x - centre).square().mean(0)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    adapter = syncnorm.TentAdapter(layer)
    by_batch = (x - centre) / (square + layer.eps).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(adapter(x), by_batch.detach(), rtol=1e-12, atol=1e-12)
    adapter.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert (layer.r_max, layer.warmup) == (1.3, 3)
    syncnorm.adapt_batch_norm(layer, x.split(7))
    assert torch.equal(layer.running_mean, centre)
    torch.testing.assert_close(layer.running_var, square, rtol=1e-12, atol=1e-12)


def test_bad_options_and_missing_statistics_are_refused() -> None:
    for options, text in (
        ({"window": 0}, r"window is a number of batches, at least 1; got 0"),
        ({"window": 2.0}, r"window is a number of batches, at least 1; got 2\.0"),
        ({"warmup": -1}, r"warmup is a number of batches, at least 0; got -1"),
        ({"r_max": 0.5}, r"r_max must be at least 1 \(1 is no correction\), got 0\.5"),
        ({"eps": 0.0}, None),
    ):
        if text is None:
            with pytest.raises(ValueError, match=r"MovingAverageBatchNorm2d\(3\): eps must be positive when training"):
                make(**options)(torch.randn(2, 3, 4, 4))
        else:
            with pytest.raises(ValueError, match=text):
                MovingAverageBatchNorm2d(3, **options)
    layer = MovingAverageBatchNorm2d(3)
    with pytest.raises(ValueError, match=r"MovingAverageBatchNorm2d\(3\): expected 3 channels in dim 1"):
        layer(torch.randn(2, 5, 2, 2))
    layer.running_var = None
    with pytest.raises(syncnorm.SyncNormError, match="evaluates by running statistics, and they have been removed"):
        layer(torch.randn(2, 3, 2, 2))


def test_batches_of_two_digits_train() -> None:
    """The paper's claim at the size of this test: with two samples a batch, batch norm fails and this does not."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, labels = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order], torch.tensor(digits.target)[order]

    def error(norm: type[nn.Module]) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 64), norm(64), nn.ReLU())
        if norm is not nn.BatchNorm1d:
            for linear in (net[0], net[3]):
                syncnorm.modules.weight_centralization(linear)
        net.append(nn.Linear(64, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.003, momentum=0.9)
        for start in range(0, 1000, 2):
            loss = nn.functional.cross_entropy(net(images[start : start + 2]), labels[start : start + 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return float((net.eval()(images[1000:]).argmax(1) != labels[1000:]).float().mean())

    assert error(MovingAverageBatchNorm1d) < 0.15 < 0.25 < error(nn.BatchNorm1d)
