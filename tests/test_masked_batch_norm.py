"""Tier: gloo ranks. Statistics of the values that count equal torch's on those values alone, over any split."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.modules import BatchRenorm1d
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch


class OnlyTheseCount(nn.BatchNorm1d):
    """Batch norm by the weighted moments of the whole batch, written out; autograd for the gradients."""

    def __init__(self, num_features: int, weights: Tensor) -> None:
        super().__init__(num_features, dtype=torch.float64)
        self.counts = weights

    def forward(self, x: Tensor) -> Tensor:
        w = self.counts[:, None].expand(x.size(0), 1, *x.shape[2:]).double()
        dims = [d for d in range(x.dim()) if d != 1]
        wide = [1 if d != 1 else -1 for d in range(x.dim())]
        total = w.sum()
        mean = (x * w).sum(dims) / total
        var = (w * (x - mean.view(wide)).square()).sum(dims) / total
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        x_hat = (x - mean.view(wide)) / (var + self.eps).sqrt().view(wide)
        return x_hat * self.weight.view(wide) + self.bias.view(wide)


class Masked(nn.Module):
    """Our layer with the mask bound, so that the shared oracle can call it; the layer's own names."""

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, mask=self.mask)

    def named_parameters(self, *args: object, **kwargs: object) -> object:
        return self.layer.named_parameters()

    def named_buffers(self, *args: object, **kwargs: object) -> object:
        return self.layer.named_buffers()


def lengths_mask(samples: int, length: int) -> Tensor:
    """Ragged sequences: sample i has i mod (length + 1) valid steps, so that some have none."""
    return torch.arange(length)[None] < (torch.arange(samples) % (length + 1))[:, None]


def _over_ranks(splits: list[int], kind: str) -> dict[str, float]:
    samples = sum(splits)
    x, loss_weight = whole_batch((samples, 3, 5))
    mask: Tensor = lengths_mask(samples, 5)
    if kind == "weights":
        mask = mask * (1 + torch.arange(samples, dtype=torch.float64)[:, None] / 3)
    if kind == "samples":
        mask = torch.arange(samples) % 3 != 1
    oracle = OnlyTheseCount(3, mask if mask.dim() == 2 else mask[:, None])
    randomise_affine(oracle)
    layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
    layer.load_state_dict(oracle.state_dict())
    part = my_slice(splits)
    exact = results(oracle, x, loss_weight)
    with count_collectives() as counts:
        mine = results(Masked(layer, mask[part]), x[part], loss_weight[part], second_order=False)
    assert counts == {"all_reduce": 2}
    kept = {name: value for name, value in exact.items() if not name.startswith(("ddx", "sum:dd"))}
    return errors(mine, kept, part)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["bool", "weights", "samples"])
@pytest.mark.parametrize("splits", [[4, 4], [5, 0, 3], [1, 7]], ids=str)
def test_ranks_equal_the_whole_batch_of_what_counts(splits: list[int], kind: str) -> None:
    for per_rank in run_ranks(_over_ranks, len(splits), splits, kind):
        assert max(per_rank.values()) <= 1e-12, per_rank


def test_second_derivatives_equal_the_formula() -> None:
    x, loss_weight = whole_batch((6, 3, 5))
    mask = lengths_mask(6, 5)
    oracle = OnlyTheseCount(3, mask)
    layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
    exact, mine = results(oracle, x, loss_weight), results(Masked(layer, mask), x, loss_weight)
    for name in exact:
        scale = max(float(exact[name].abs().max()), 1.0)
        assert float((mine[name] - exact[name]).abs().max()) <= 1e-12 * scale, name


def test_ragged_sequences_have_the_statistics_of_their_packed_values() -> None:
    x, _ = whole_batch((6, 3, 5))
    mask = lengths_mask(6, 5)
    layer, packed = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    y = layer(x, mask=mask)
    values = x.transpose(1, 2)[mask]  # [valid, C], as a packed sequence holds them
    torch.testing.assert_close(y.transpose(1, 2)[mask], packed(values), rtol=1e-12, atol=1e-12)
    for name, value in packed.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_a_full_mask_is_no_mask_and_padding_may_be_nan() -> None:
    x, loss_weight = whole_batch((6, 3, 5))
    plain, masked = (syncnorm.SyncBatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    exact = results(plain, x, loss_weight)
    mine = results(Masked(masked, torch.ones(6, dtype=torch.bool)), x, loss_weight)
    for name in exact:
        torch.testing.assert_close(mine[name], exact[name], rtol=1e-10, atol=1e-10)
    dirty = torch.cat([x, torch.full((2, 3, 5), torch.nan, dtype=torch.float64)])
    clean = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
    y = clean(dirty, mask=torch.arange(8) < 6)
    torch.testing.assert_close(y[:6], syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)(x), rtol=1e-12, atol=1e-12)
    assert clean.running_var.isfinite().all()


def test_padding_that_is_not_finite_leaves_the_gradients_alone() -> None:
    x, loss_weight = whole_batch((6, 3, 5))
    mask = lengths_mask(6, 5)
    found = []
    for padding in (0.5, torch.nan, torch.inf):
        layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
        dirty = torch.where(mask[:, None], x, padding).requires_grad_()
        y = layer(dirty, mask=mask)
        values = (y * loss_weight).transpose(1, 2)[mask]  # a loss that leaves padding out
        found.append(torch.autograd.grad(values.square().sum(), [dirty, *layer.parameters()]))
        assert torch.equal(y.isfinite(), dirty.isfinite())
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=0, atol=0)


def test_compiled_step_equals_eager() -> None:
    x, _ = whole_batch((6, 3, 5))
    mask = lengths_mask(6, 5)
    eager, layer = (syncnorm.SyncBatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    torch._dynamo.reset()
    a, b = (x.clone().requires_grad_() for _ in range(2))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(a, mask=mask).pow(3).sum().backward()
    eager(b, mask=mask).pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_var, eager.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_its_dtype_and_its_accuracy(dtype: torch.dtype) -> None:
    x, _ = whole_batch((6, 3, 5), dtype=dtype)
    mask = lengths_mask(6, 5)
    y = syncnorm.SyncBatchNorm1d(3)(x, mask=mask)
    exact = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)(x.double(), mask=mask)
    assert y.dtype == dtype
    assert float((y.double() - exact).abs().max().detach()) <= 2 * torch.finfo(dtype).eps * float(
        exact.abs().max().detach()
    )


def test_masks_that_do_not_fit_are_refused() -> None:
    layer = syncnorm.SyncBatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    for mask in (torch.ones(5), torch.ones(4, 3, 5), torch.ones(4, 4)):
        with pytest.raises(
            ValueError, match=r"SyncBatchNorm1d\(3\): mask must be \[N\], \[N, \*\] or \[N, 1, \*\] for an input"
        ):
            layer(x, mask=mask)
    with pytest.raises(TypeError, match=r"mask must be bool or real weights, got torch\.complex64"):
        layer(x, mask=torch.ones(4, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"BatchRenorm1d\(3\): this kind of norm takes no mask; SyncBatchNorm does"):
        BatchRenorm1d(3)(x, mask=torch.ones(4))
    assert layer.num_batches_tracked == 0


def _nothing_counts() -> list[float]:
    layer = syncnorm.SyncBatchNorm1d(2)
    y = layer(torch.randn(3, 2), mask=torch.zeros(3, dtype=torch.bool))
    assert y.isfinite().all()
    only_one = torch.arange(3) == (dist.get_rank() * 5)  # one value on rank 0, none on rank 1
    with pytest.raises(ValueError, match="expected more than 1 value per channel in the whole group"):
        layer(torch.randn(3, 2), mask=only_one)
    return [*layer.running_mean.tolist(), float(layer.num_batches_tracked)]


@pytest.mark.gloo
def test_nothing_that_counts_changes_nothing() -> None:
    for per_rank in run_ranks(_nothing_counts, 2):
        assert per_rank == [0.0, 0.0, 0.0]
