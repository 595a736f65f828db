"""Tier: no process. Instance norm against its formula in numpy, and against torch's layer with running statistics."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.functional import instance_norm

LAYERS = {3: "InstanceNorm1d", 4: "InstanceNorm2d", 5: "InstanceNorm3d"}


def sample(*shape: int) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(*shape, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 4, 1, 5), (2, 4, 3, 2, 3)])
def test_layer_equals_the_formula(shape: tuple[int, ...]) -> None:
    x = sample(*shape)
    layer = getattr(syncnorm, LAYERS[len(shape)])(4, affine=True, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    axes, vector = tuple(range(2, len(shape))), [1, 4] + [1] * (len(shape) - 2)
    array = x.numpy()
    want = (array - array.mean(axes, keepdims=True)) / np.sqrt(array.var(axes, keepdims=True) + 1e-5)
    want = want * layer.weight.detach().numpy().reshape(vector) + layer.bias.detach().numpy().reshape(vector)
    np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=0, atol=1e-13)
    np.testing.assert_allclose(layer(x[0]).detach().numpy(), want[0], rtol=0, atol=1e-13)


def test_gradients_of_both_orders() -> None:
    inputs = tuple(t.requires_grad_() for t in (sample(2, 3, 4), sample(3), sample(3) + 1))
    assert gradcheck(lambda x, w, b: instance_norm(x, weight=w, bias=b), inputs)
    assert gradgradcheck(lambda x, w, b: instance_norm(x, weight=w, bias=b), inputs)


def test_is_batch_norm_of_one_sample_and_of_samples_as_channels() -> None:
    x = sample(3, 4, 5, 2)
    alone = torch.cat([functional.batch_norm(one[None], None, None, training=True) for one in x])
    folded = functional.batch_norm(x.reshape(1, 12, 5, 2), None, None, training=True).reshape(x.shape)
    torch.testing.assert_close(instance_norm(x), alone, rtol=0, atol=1e-13)
    torch.testing.assert_close(instance_norm(x), folded, rtol=0, atol=1e-13)


def test_running_statistics_are_torchs() -> None:
    ours, theirs = (
        package.InstanceNorm2d(4, momentum=0.3, affine=True, track_running_stats=True, dtype=torch.float64)
        for package in (syncnorm, nn)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys() and isinstance(ours, nn.InstanceNorm2d)
    for step in range(3):
        x = sample(2, 4, 3, 5) * (step + 1)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-13)
    before = ours.running_mean.clone()
    ours.train()(x[:0])
    assert torch.equal(ours.running_mean, before)
    assert ours.eval()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_counts_no_batch(use_reentrant: bool) -> None:
    plain, recomputed = (syncnorm.InstanceNorm1d(3, track_running_stats=True) for _ in range(2))
    x = torch.randn(2, 3, 5, requires_grad=True)
    plain(x)
    checkpoint(recomputed, x, use_reentrant=use_reentrant).pow(3).sum().backward()
    assert torch.equal(recomputed.running_mean, plain.running_mean)
    assert torch.equal(recomputed.running_var, plain.running_var)


def test_running_statistics_in_a_checkpoint_without_metadata_are_unexpected_keys() -> None:
    tracked = dict(syncnorm.InstanceNorm2d(4, affine=True, track_running_stats=True).state_dict())
    layer = syncnorm.InstanceNorm2d(4, affine=True)
    assert layer.load_state_dict(tracked, strict=False).unexpected_keys == [
        "running_mean", "running_var", "num_batches_tracked",
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float16, 200.0), (torch.bfloat16, 200.0), (torch.float32, 1000.0)])
def test_a_large_mean_in_every_dtype(dtype: torch.dtype, mean: float) -> None:
    x = (sample(2, 4, 8, 8) + mean).to(dtype)
    exact = instance_norm(x.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        y = instance_norm(x.contiguous(memory_format=layout))
        # rounding of an output up to 4, and in float32 1000 · 6e-8 of the mean
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=max(2 * torch.finfo(dtype).eps, 1e-4) * 2)
        assert y.is_contiguous(memory_format=layout)
    if dtype == torch.float16:
        assert (functional.instance_norm(x).double() - exact).abs().max() > 0.02  # torch rounds the mean to float16


@pytest.mark.parametrize("training", [True, False])
def test_one_value_per_channel_gives_the_bias(training: bool) -> None:
    layer = syncnorm.InstanceNorm2d(4, affine=True).train(training)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 1, 1, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.reshape(1, 4, 1, 1).expand(2, 4, 1, 1))
    y.sum().backward()
    assert not x.grad.any()
    assert layer(x[:0]).shape == (0, 4, 1, 1)


def test_errors_say_what_to_do() -> None:
    layer = syncnorm.InstanceNorm2d(4)
    with pytest.raises(ValueError, match=r"InstanceNorm2d: expected 4 channels in dim 1, got an input \[2, 3, 5, 5\]"):
        layer(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"of 4 dims, or of 3 for a single sample, got \[2, 4\]"):
        layer(torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        layer(torch.ones(2, 4, 5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"momentum must be a number to track running statistics, got None"):
        syncnorm.InstanceNorm2d(4, momentum=None, track_running_stats=True)
    tracking = syncnorm.InstanceNorm2d(4, track_running_stats=True)
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel, got an input \[2, 4, 1, 1\]\. Use larger maps"
    ):
        tracking(torch.randn(2, 4, 1, 1))
    with pytest.raises(ValueError, match=r"needs running_mean and running_var, got None"):
        instance_norm(torch.randn(2, 4, 5), use_input_stats=False)
    with pytest.raises(ValueError, match=r"with a spatial dim, got \[2, 4\]"):
        instance_norm(torch.randn(2, 4))
