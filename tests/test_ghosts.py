"""Tier: no process. The ghosts of one rank in one call each way: each is torch's own layer on its samples, in float64."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from syncnorm.distributed.groups import LOCAL
from syncnorm.functional import ghost_batch_norm
from syncnorm.functional._ghosts import normalize_ghosts
from syncnorm.functional._walk import Walk
from syncnorm.kernels import BACKENDS, alone, objections
from syncnorm.modules import GhostBatchNorm1d, GhostBatchNorm2d

SERVING = [name for name, reason in objections(torch.empty(2, 3, 4)).items() if reason is None]
ALONE = [name for name in SERVING if alone(BACKENDS[name], torch.empty(2, 3)) is not None]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[N, C]": lambda x: x[..., 0, 0].contiguous(),
    "[N, C, L]": lambda x: x.flatten(2),
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "3-D": lambda x: x.unflatten(2, (2, -1)),
    "3-D, channels_last": lambda x: x.unflatten(2, (2, -1)).contiguous(memory_format=torch.channels_last_3d),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[..., :1].expand_as(x),
}
SIZES = [[4, 4, 4, 4], [7, 7, 2], [1] * 16, [15, 1]]


def whole_calls(**options: Any) -> Walk:
    return Walk(1e-5, LOCAL, options.pop("backend", "auto"), True, **options)


def leaves(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(2, channels, generator=generator, dtype=torch.float64).to(dtype)
    return weight.requires_grad_(), bias.requires_grad_()


def data(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return (x * 2 + 3).to(dtype), grad.to(dtype)


def exactly(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """Each ghost through torch's own batch norm in float64."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    parts = [functional.batch_norm(p, None, None, weight, bias, True, 0.0, 1e-5) for p in x.split(sizes)]
    y = torch.cat(parts)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], grad.double())
    means = torch.stack([p.detach().transpose(0, 1).flatten(1).mean(1) for p in x.split(sizes)])
    m2 = [p.detach().transpose(0, 1).flatten(1) for p in x.split(sizes)]
    squares = torch.stack([(p - p.mean(1, keepdim=True)).square().sum(1) for p in m2])
    return {"y": y.detach(), "x": dx, "weight": dweight, "bias": dbias, "mean": means, "m2": squares}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", SERVING)
def test_each_ghost_is_torchs_layer(backend: str, layout: str, dtype: torch.dtype) -> None:
    x, grad = (LAYOUTS[layout](t) for t in data((16, 5, 6, 4), dtype))
    weight, bias = leaves(5, torch.promote_types(dtype, torch.float32))
    # One rounding of a result, and those of float32 arithmetic before it, at the scale of what is subtracted: a ghost of two
    # samples may be far from zero for its variance.
    out, wide = torch.finfo(dtype).eps, torch.finfo(weight.dtype).eps
    for sizes in SIZES:
        if layout == "[N, C]" and 1 in sizes:
            continue
        leaf = x.detach().requires_grad_()
        y, moments = normalize_ghosts(leaf, sizes, weight, bias, whole_calls(backend=backend))
        assert y.dtype == dtype and y.shape == x.shape
        if x.is_contiguous() or "last" in layout:
            assert y.stride() == x.stride()
        dx, dweight, dbias = torch.autograd.grad(y, [leaf, weight, bias], grad)
        assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, weight.dtype, weight.dtype)
        exact = exactly(x, grad, weight, bias, sizes)
        got = {"y": y, "x": dx, "weight": dweight, "bias": dbias, "mean": moments.mean, "m2": moments.m2}
        count = torch.tensor(sizes, dtype=torch.float64) * (x[:, 0].numel() // 16)
        assert torch.equal(moments.count, count)
        rstd = (exact["m2"] / count[:, None] + 1e-5).rsqrt().max()
        subtracted = float(rstd * weight.detach().abs().max() * torch.maximum(x.abs().max(), grad.abs().max()))
        for name, value in got.items():
            largest = float(exact[name].abs().max())
            elementwise = name in ("y", "x")
            bound = 4 * wide * subtracted + out * largest if elementwise else 64 * wide * max(largest, 1.0)
            error = float((value.detach().double() - exact[name]).abs().max())
            assert error <= bound, (name, sizes, error, bound)


@pytest.mark.parametrize("backend", SERVING)
def test_second_derivatives(backend: str) -> None:
    x = data((5, 2, 3), torch.float64)[0].requires_grad_()
    weight, bias = leaves(2, torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        return normalize_ghosts(tensors[0], [2, 3], tensors[1], tensors[2], whole_calls(backend=backend))[0]

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda w, b: run(x.detach(), w, b), (weight, bias))


class Calls(TorchDispatchMode):
    """Counts the operations that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["[N, C]", "contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ALONE)
def test_a_step_takes_one_call_each_way_and_joins_nothing(backend: str, layout: str) -> None:
    layer = (GhostBatchNorm1d if layout == "[N, C]" else GhostBatchNorm2d)(5, 3, backend=backend)
    x, grad = (LAYOUTS[layout](t) for t in data((16, 5, 6, 4), torch.float32))
    x.requires_grad_()
    with Calls() as calls:
        layer(x).backward(grad)
    ours = [name for name in calls.names if name.startswith("syncnorm::")]
    assert ours == ["syncnorm::batch_forward", "syncnorm::update_running", "syncnorm::batch_backward"]
    large = ("cat", "split", "clone", "copy_", "contiguous", "add")
    assert not [name for name in calls.names if name.removeprefix("aten::") in large]


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "x and bias", "no affine"])
@pytest.mark.parametrize("backend", SERVING)
def test_only_what_is_asked_for_gets_a_gradient(backend: str, needs: str) -> None:
    x, grad = data((7, 3, 5), torch.float64)
    weight, bias = leaves(3, torch.float64)
    exact = exactly(x, grad, *((weight, bias) if needs != "no affine" else (torch.ones(3), torch.zeros(3))), [4, 3])
    x.requires_grad_("x" in needs or needs == "no affine")
    weight.requires_grad_(needs == "weight"), bias.requires_grad_("bias" in needs)
    affine = (None, None) if needs == "no affine" else (weight, bias)
    y, _ = normalize_ghosts(x, [4, 3], *affine, whole_calls(backend=backend))
    y.backward(grad)
    for name, leaf in (("x", x), ("weight", weight), ("bias", bias)):
        assert (leaf.grad is not None) == (leaf.requires_grad and (name == "x" or needs != "no affine"))
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", SERVING)
def test_an_activation_in_place_may_follow(backend: str) -> None:
    gradients = []
    for inplace in (True, False):
        layer = GhostBatchNorm2d(3, 2, backend=backend, dtype=torch.float64)
        x = data((5, 3, 4, 4), torch.float64)[0].requires_grad_()
        nn.Sequential(layer, nn.ReLU(inplace))(x).square().sum().backward()
        gradients.append((x.grad, layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _selective(*saved: Any) -> Callable[..., Tensor]:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if not saved or op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda run, x: checkpoint(run, x, use_reentrant=False, context_fn=contexts)


# torch pairs the operations of a selective recompute by their number, and the layer calls some that users do, too.
CHECKPOINTS: dict[str, Callable[..., Tensor]] = {
    "not reentrant": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "selective, all": _selective(),
    "selective, products": _selective(torch.ops.aten.mul.Tensor),
    "selective, quotients": _selective(torch.ops.aten.div.Tensor, torch.ops.aten.sub.Tensor),
    "selective, joined": _selective(torch.ops.aten.cat.default, torch.ops.aten.stack.default),
}


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("sizes", [[4, 4, 1], [9]], ids=str)
def test_a_recompute_of_a_checkpoint_counts_nothing(backend: str, sizes: list[int]) -> None:
    results = {}
    for name, way in {"plain": lambda run, x: run(x), **CHECKPOINTS}.items():
        layer = GhostBatchNorm2d(3, sizes[0], backend=backend, dtype=torch.float64)

        def run(x: Tensor, layer: nn.Module = layer) -> Tensor:
            h = layer(layer(x * 1.5).sigmoid() * x / (x + 9.0))
            return torch.cat([h, x - h / 3.0]) * 2.0

        x = data((9, 3, 4, 4), torch.float64)[0].requires_grad_()
        (way(run, x).pow(3).sum() + way(layer, x).sum()).backward()
        results[name] = [x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    assert results["plain"][-1] == 3
    for name, other in results.items():
        for exact, value in zip(results["plain"], other, strict=True):
            scale = float(exact.abs().max())
            torch.testing.assert_close(value, exact, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", SERVING)
def test_running_statistics_are_the_weighted_averages_and_no_samples_change_nothing(backend: str) -> None:
    x = data((9, 3, 4, 4), torch.float64)[0]
    mean, var, counter = torch.zeros(3).double(), torch.ones(3).double(), torch.tensor(0)
    for batch, sizes in ((x, [4, 4, 1]), (x[:, :, :1, :1], [4, 5]), (x[:0], [])):
        expected = mean.clone(), var.clone()
        for part in batch.split(sizes) if sizes else ():
            flat, share = part.transpose(0, 1).flatten(1), 0.1 * len(part) / 9
            expected[0].add_(share * (flat.mean(1) - mean))
            expected[1].add_(share * (flat.var(1) - var))
        ghost_batch_norm(batch, mean, var, 4, training=True, num_batches_tracked=counter, backend=backend)
        torch.testing.assert_close((mean, var), expected, rtol=1e-12, atol=1e-12)
    assert counter == 2
