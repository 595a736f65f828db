"""Tier: no process, and gloo ranks. A residual and an activation within the layer, against the three layers they replace."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

import syncnorm
from syncnorm.core.activation import Activation
from syncnorm.kernels import objections
from syncnorm.modules import BatchRenorm2d, FrozenBatchNorm2d, GhostBatchNorm2d, MovingAverageBatchNorm2d
from syncnorm.testing import run_ranks

BACKENDS = [name for name in ("reference", "aten", "native") if objections(torch.empty(2, 3, 4))[name] is None]
ACTIVATIONS = {
    None: lambda x: x,
    "relu": functional.relu,
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "silu": functional.silu,
    "gelu": functional.gelu,
}


class Composed(nn.Module):
    """Torch's batch norm, an addition and torch's activation."""

    def __init__(self, norm: nn.Module, activation: str | None) -> None:
        super().__init__()
        self.norm, self.activation = norm, ACTIVATIONS[activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.activation(y if residual is None else y + residual)


def layers(
    activation: str | None, backend: str = "auto", dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Composed]:
    """A fused layer and what it stands for, with the same random affine parameters."""
    torch.manual_seed(1)
    fused = syncnorm.SyncBatchNorm2d(5, activation=activation, negative_slope=0.2, backend=backend, dtype=dtype)
    composed = nn.BatchNorm2d(5, dtype=dtype)
    for layer in (fused, composed):
        torch.manual_seed(2)
        nn.init.uniform_(layer.weight, -1, 1)
        nn.init.uniform_(layer.bias, -1, 1)
    return fused, Composed(composed, activation)


def results(layer: nn.Module, x: Tensor, residual: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """Output, every gradient, buffers."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual)
    y.backward(grad)
    found = {"y": y.detach(), "dx": x.grad}
    if residual is not None:
        found["dresidual"] = residual.grad
    found |= {name.removeprefix("norm."): p.grad for name, p in layer.named_parameters()}
    return found | {f"buffer.{name.removeprefix('norm.')}": b for name, b in layer.named_buffers()}


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error = (ours[name].double() - value.double()).abs().max() / (1 + value.double().abs().max())
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_is_the_composition(backend: str, activation: str, with_residual: bool, channels_last: bool) -> None:
    fused, composed = layers(activation, backend)
    torch.manual_seed(3)
    x, residual, grad = torch.randn(3, 4, 5, 7, 3, dtype=torch.float64).mul(2).add(1)
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    residual = residual if with_residual else None  # its own layout differs from that of x: channels_last or not
    assert_same(results(fused, x, residual, grad), results(composed, x, residual, grad))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_evaluation(activation: str, with_residual: bool) -> None:
    fused, composed = (layer.eval() for layer in layers(activation, dtype=torch.float32))
    x, residual, grad = torch.randn(3, 4, 5, 7, 3)
    residual = residual if with_residual else None
    assert_same(results(fused, x, residual, grad), results(composed, x, residual, grad), 0.0)
    with torch.no_grad():
        assert (fused(x, residual) - composed(x, residual)).abs().max() <= 2e-6
        assert torch.export.export(fused, (x, residual)).module()(x, residual).equal(composed(x, residual))


def test_evaluation_has_forward_mode_derivatives() -> None:
    fused, composed = (layer.eval().requires_grad_(False) for layer in layers("silu"))
    x, tangent, residual = torch.randn(3, 4, 5, 7, 3, dtype=torch.float64)
    found = []
    for layer in (fused, composed):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent), residual)).tangent)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rounds_once(backend: str, activation: str, dtype: torch.dtype) -> None:
    fused, composed = layers(activation, backend, torch.float32)
    torch.manual_seed(3)
    x, residual, grad = torch.randn(3, 8, 5, 7, 3).to(dtype)
    exact = results(composed.double(), x.double(), residual.double(), grad.double())
    ours = results(fused, x, residual, grad)
    ulp = torch.finfo(dtype).eps
    for name in ("y", "dx", "dresidual"):
        # An output near 0 may fall on the other side of it: there the gradient is another one, in every implementation.
        sure = exact["y"].abs() > 1e-5 if activation == "relu" else torch.ones_like(exact["y"], dtype=torch.bool)
        sure |= exact["y"] == 0
        error = (ours[name].double() - exact[name]).abs() / (0.02 + exact[name].abs())
        assert error[sure].max() <= ulp, name


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative(activation: str, with_residual: bool) -> None:
    fused, composed = layers(activation, "reference")
    torch.manual_seed(3)
    x, residual, grad = torch.randn(3, 4, 5, 2, 3, dtype=torch.float64)

    def penalty(layer: nn.Module) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in ([x, residual] if with_residual else [x])]
        leaves = [*inputs, *layer.parameters()]
        gradients = torch.autograd.grad((layer(*inputs) * grad).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(3).sum() for g in gradients), leaves, materialize_grads=True))

    for ours, exact in zip(penalty(fused), penalty(composed), strict=True):
        assert (ours - exact).abs().max() <= 1e-11 * (1 + exact.abs().max())


@pytest.mark.parametrize(("activation", "with_residual"), [("relu", False), ("relu", True), ("silu", True)])
def test_compile_in_one_graph(activation: str, with_residual: bool) -> None:
    fused, composed = layers(activation)
    x, residual, grad = torch.randn(3, 4, 5, 7, 3, dtype=torch.float64)
    residual = residual if with_residual else None
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x_ours = x.clone().requires_grad_()
    compiled(x_ours, residual).backward(grad)
    x_exact = x.clone().requires_grad_()
    composed(x_exact, residual).backward(grad)
    assert (x_ours.grad - x_exact.grad).abs().max() <= 1e-12
    assert (fused.running_var - composed.norm.running_var).abs().max() <= 1e-12


def saved_bytes(layer: nn.Module, *inputs: Tensor) -> int:
    """Bytes of distinct memory that autograd keeps for the backward, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(*inputs)
    assert y.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_the_backward() -> None:
    x = torch.randn(8, 5, 32, 32, requires_grad=True)
    residual = torch.randn(8, 5, 32, 32, requires_grad=True)
    one, small = x.nbytes, 5 * 8 * 10
    for activation in ("relu", "leaky_relu", "silu", "gelu"):
        fused, composed = layers(activation, dtype=torch.float32)
        assert saved_bytes(fused, x) <= one + small
        assert saved_bytes(composed, x) >= 2 * one
        by_sign = activation in ("relu", "leaky_relu")
        assert saved_bytes(fused, x, residual) <= one + (x.numel() // 8 if by_sign else one) + small
    efficient = syncnorm.SyncBatchNorm2d(5, activation="leaky_relu", memory_efficient=True)
    model = nn.Sequential(efficient, nn.Conv2d(5, 5, 1))
    assert saved_bytes(model, x) <= one + small  # the output, which the convolution keeps anyway
    assert saved_bytes(nn.Sequential(composed, nn.Conv2d(5, 5, 1)), x) >= 3 * one


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_efficient(backend: str, activation: str | None, channels_last: bool) -> None:
    fused, composed = layers(activation, backend)
    fused.memory_efficient = True
    torch.manual_seed(3)
    x, grad = torch.randn(2, 4, 5, 7, 3, dtype=torch.float64).mul(2).add(1)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(results(fused, x, None, grad), results(composed, x, None, grad), 1e-11)
    y = fused(x.requires_grad_())
    with pytest.raises(syncnorm.SyncNormError, match="no second derivative without the input"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_memory_efficient_refuses_what_it_cannot_invert() -> None:
    x = torch.randn(4, 5, 7, 3)
    for activation, slope in (("relu", 0.01), ("silu", 0.01), ("leaky_relu", 0.0), ("leaky_relu", -0.1)):
        with pytest.raises(ValueError, match=f"leaky_relu of positive slope; got '{activation}'"):
            syncnorm.SyncBatchNorm2d(5, activation=activation, negative_slope=slope, memory_efficient=True)
    layer = syncnorm.SyncBatchNorm2d(5, memory_efficient=True)
    with pytest.raises(ValueError, match="which a residual makes impossible"):
        layer(x, x)
    with torch.no_grad():
        layer.weight[3] = 0
    with pytest.raises(ValueError, match=r"dividing by the weight.*in 1 of 5 channels, the first of them \[3\]"):
        layer(x)
    with torch.no_grad():
        layer.weight[3], layer.bias[3] = 0.1, -100
    with pytest.raises(ValueError, match=r"\|bias\|/128 in size"):
        layer(x)
    assert layer.num_batches_tracked == 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"activation must be None or one of \['relu', .*got 'tanh'"):
        syncnorm.SyncBatchNorm2d(5, activation="tanh")
    layer, x = syncnorm.SyncBatchNorm2d(5, activation="relu"), torch.randn(4, 5, 7, 3)
    for residual in (torch.randn(4, 5, 7, 1), torch.randn(5, 1, 1), torch.randn(4, 5, 7, 3).half()):
        for mode in (True, False):
            with pytest.raises(ValueError, match="residual must have the shape, dtype and device of the input"):
                layer.train(mode)(x, residual)
    assert layer.num_batches_tracked == 0
    with pytest.raises(syncnorm.SyncNormError, match="applies 'relu', and BatchNorm2d would not"):
        syncnorm.revert(layer)


def test_two_ways_through_one_layer_in_one_graph() -> None:
    """The first call is torch's, which saves the running statistics; the second one moves them."""
    fused, composed = layers(None)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    for layer in (fused, composed):
        (layer(x).square().sum() + layer(2 * x, x.relu()).square().sum()).backward()
    composed_state = composed.norm.state_dict()
    assert all(torch.allclose(value, composed_state[name]) for name, value in fused.state_dict().items())
    for mine, theirs in zip(fused.parameters(), composed.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_an_activation_is_part_of_copies_and_may_change() -> None:
    layer = syncnorm.SyncBatchNorm2d(5, activation="leaky_relu", negative_slope=0.3)
    assert "activation=leaky_relu, negative_slope=0.3" in repr(layer)
    assert layer.state_dict().keys() == nn.BatchNorm2d(5).state_dict().keys()
    x = torch.randn(4, 5, 7, 3)
    assert copy.deepcopy(layer)(x).equal(layer(x))
    layer.activation = Activation("leaky_relu", 0.5)
    assert layer.activation == "leaky_relu"
    layer.activation = None
    assert "activation" not in repr(layer)
    assert type(syncnorm.revert(layer)) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", [syncnorm.SyncBatchNorm2d, BatchRenorm2d, syncnorm.GroupNorm])
def test_another_activation_for_one_call(kind: type[nn.Module]) -> None:
    layer, x = (
        kind(6, **({"num_groups": 2} if kind is syncnorm.GroupNorm else {"momentum": 0.0})),
        torch.randn(4, 6, 3, 3),
    )
    for mode in (True, False):
        y = layer.train(mode)(x)
        torch.testing.assert_close(layer(x, activation=Activation("leaky_relu", 0.2)), functional.leaky_relu(y, 0.2))
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", [GhostBatchNorm2d, BatchRenorm2d, FrozenBatchNorm2d])
def test_the_other_families_apply_it_too(kind: type[nn.Module]) -> None:
    options = {"virtual_batch_size": 2} if kind is GhostBatchNorm2d else {}
    torch.manual_seed(0)
    plain, fused = kind(5, **options), kind(5, **options)
    fused.activation = "silu"
    x, residual = torch.randn(2, 4, 5, 7, 3)
    assert fused(x, residual).equal(functional.silu(plain(x) + residual))


def _over_ranks(shards: list[list[int]], activation: str, backend: str) -> float:
    rank = torch.distributed.get_rank()
    fused, composed = layers(activation, backend)
    worst = 0.0
    torch.manual_seed(4)
    for sizes in shards:
        x, residual, grad = torch.randn(3, sum(sizes), 5, 4, 3, dtype=torch.float64)
        exact = results(composed, x, residual, grad)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        ours = results(fused, x[own], residual[own], grad[own])
        for name in ("y", "dx", "dresidual"):
            if ours[name].numel():
                worst = max(worst, float((ours[name] - exact[name][own]).abs().max()))
        for name in ("weight", "bias"):
            torch.distributed.all_reduce(ours[name])
            worst = max(worst, float((ours[name] - exact[name]).abs().max()))
        for name, buffer in exact.items():
            if name.startswith("buffer."):
                worst = max(worst, float((ours[name] - buffer).abs().max()))
        for layer in (fused, composed):
            layer.zero_grad()
    return worst


@pytest.mark.gloo
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_over_ranks(activation: str) -> None:
    shards = [[3, 3, 2], [5, 0, 3]]
    for backend in ("native", "reference"):
        assert max(run_ranks(_over_ranks, 3, shards, activation, backend, timeout=60)) <= 1e-12


FAMILIES = {
    "sync": lambda: syncnorm.SyncBatchNorm2d(5),
    "masked": lambda: syncnorm.SyncBatchNorm2d(5),
    "renorm": lambda: BatchRenorm2d(5),
    "moving average": lambda: MovingAverageBatchNorm2d(5),
    "ghost": lambda: GhostBatchNorm2d(5, virtual_batch_size=2),
    "frozen": lambda: FrozenBatchNorm2d(5),
}


def _one_refuses(kind: str) -> tuple[str, bool]:
    layer, x = FAMILIES[kind](), torch.randn(4, 5, 3, 3)
    before = copy.deepcopy(dict(layer.named_buffers()))
    residual = x if torch.distributed.is_initialized() and torch.distributed.get_rank() else x[:1]
    try:
        layer(x, residual, torch.ones(4) if kind == "masked" else None)
        raised = "nothing"
    except (ValueError, syncnorm.SyncNormError) as error:
        raised = type(error).__name__
    return raised, all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_refused_residual_changes_nothing(kind: str) -> None:
    assert _one_refuses(kind) == ("ValueError", True)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_refused_residual_does_not_leave_the_others_waiting(kind: str) -> None:
    told = "nothing" if kind == "frozen" else "SyncNormMismatch"
    assert run_ranks(_one_refuses, 2, kind, timeout=30) == [("ValueError", True), (told, True)]
