"""Tier: no process. Row and group norms as functions: every order of derivative, what is kept, residuals, activations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

import syncnorm
from syncnorm.errors import SyncNormError
from syncnorm.functional import group_norm, instance_norm, layer_norm, rms_norm
from syncnorm.kernels.rows import row_objections

SERVING = [name for name, reason in row_objections(torch.empty(2, 3)).items() if reason is None]
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "silu": F.silu, "gelu": F.gelu,
}  # fmt: skip


def sample(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.3


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def in_plain_torch(name: str, x: Tensor, *parameters: Tensor, **options: Any) -> Any:
    """The same from torch's functions, one after the other."""
    residual, activation = options.get("residual"), options.get("activation")
    h = x if residual is None else x + residual
    if name == "layer_norm":
        y = F.layer_norm(h, parameters[0].shape, *parameters)
    elif name == "rms_norm":
        y = F.rms_norm(h, parameters[0].shape, *parameters, eps=1e-5)
    else:
        y = F.group_norm(h, 2, *parameters)
    y = y if activation is None else PLAIN[activation](y)
    return y if residual is None else (y, h)


def ours(name: str, backend: str, x: Tensor, *parameters: Tensor, **options: Any) -> Any:
    if name == "layer_norm":
        return layer_norm(x, parameters[0].shape, *parameters, backend=backend, **options)
    if name == "rms_norm":
        return rms_norm(x, parameters[0].shape, *parameters, eps=1e-5, backend=backend, **options)
    return group_norm(x, 2, *parameters, negative_slope=0.2, backend=backend, **options)


CASES: list[tuple[str, tuple[int, ...], list[tuple[int, ...]], dict[str, Any]]] = [
    ("layer_norm", (2, 1, 4), [(4,), (4,)], {}),
    ("layer_norm", (2, 2, 2), [(2, 2), (2, 2)], {"residual": True}),
    ("rms_norm", (2, 1, 4), [(4,)], {}),
    ("rms_norm", (2, 4), [(4,)], {"residual": True}),
    ("group_norm", (1, 4, 2, 2), [(4,), (4,)], {}),
    *(("group_norm", (1, 4, 3), [(4,), (4,)], {"activation": name}) for name in PLAIN),
]
IDS = [f"{name}{'+residual' if 'residual' in o else ''}{'+' + o['activation'] if 'activation' in o else ''}"
       for name, _, _, o in CASES]  # fmt: skip


def make(case: tuple[Any, ...]) -> tuple[str, tuple[Tensor, ...], Callable[..., dict[str, Any]]]:
    name, shape, parameters, options = case
    tensors = leaves(sample(*shape), *(sample(*s, seed=i + 1) for i, s in enumerate(parameters)))
    if "residual" not in options:
        return name, tensors, lambda given: (given, options)
    return name, (*tensors, *leaves(sample(*shape, seed=9))), lambda given: (given[:-1], {"residual": given[-1]})


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("backend", SERVING)
def test_derivatives_of_both_orders(backend: str, case: tuple[Any, ...]) -> None:
    name, inputs, split = make(case)
    if backend == "aten" and case[0] != "rms_norm" and "activation" not in case[3]:
        pytest.skip("torch's own function, derivatives and all")

    def function(*given: Tensor) -> Any:
        tensors, options = split(given)
        return ours(name, backend, *tensors, **options)

    tensors, options = split(inputs)
    torch.testing.assert_close(function(*inputs), in_plain_torch(name, *tensors, **options), rtol=1e-12, atol=1e-12)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "backend", [name for name in SERVING if name != "aten"]
)  # torch's own is off by a third (2.13)
def test_there_are_derivatives_beyond_the_second(backend: str) -> None:
    x, weight, bias = leaves(sample(2, 5), sample(5, seed=1), sample(5, seed=2))

    def formula(x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return d * (d.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * weight + bias

    thirds = []
    for function in (lambda x: layer_norm(x, 5, weight, bias, backend=backend), formula):
        value = function(x).pow(3).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.pow(2).sum()
        thirds.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*thirds, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", SERVING)
def test_what_is_kept_is_the_input_and_a_few_numbers_a_row(backend: str) -> None:
    def kept(function: Callable[[], Any]) -> list[Tensor]:
        tensors: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            tensors[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function()
        return [t for t in tensors.values() if t.numel() > 1000]

    x, residual = leaves(sample(8, 64, 4, dtype=torch.float32), sample(8, 64, 4, dtype=torch.float32))
    layers = [
        *(syncnorm.GroupNorm(64, 4, activation=name, backend=backend) for name in (None, *PLAIN)),
        syncnorm.LayerNorm((64, 4), elementwise_affine=False, backend=backend),
        syncnorm.RMSNorm((64, 4), elementwise_affine=False, backend=backend),
        syncnorm.RMSNorm((64, 4), p=0.5, elementwise_affine=False, backend=backend),
        syncnorm.InstanceNorm1d(64, backend=backend),
    ]
    for layer in layers:
        (only,) = kept(lambda layer=layer: layer(x))
        assert only.data_ptr() == x.data_ptr(), layer
        if not isinstance(layer, nn.GroupNorm | nn.InstanceNorm1d):
            results: list[Any] = []
            (only,) = kept(lambda layer=layer, results=results: results.extend(layer(x, residual)))
            assert only.data_ptr() == results[1].data_ptr(), layer


@pytest.mark.parametrize("backend", SERVING)
def test_a_gradient_of_either_result_alone(backend: str) -> None:
    x, residual, weight = leaves(sample(4, 5), sample(4, 5, seed=1), sample(5, seed=2))
    for which in (0, 1):
        mine = torch.autograd.grad(
            rms_norm(x, 5, weight, 1e-5, residual=residual, backend=backend)[which].pow(2).sum(), (x, residual)
        )
        h = x + residual
        want = torch.autograd.grad((F.rms_norm(h, (5,), weight, 1e-5), h)[which].pow(2).sum(), (x, residual))
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_laid_out_otherwise(backend: str, channels_last: bool) -> None:
    x, weight, bias = leaves(sample(2, 6, 5, 3), sample(6, seed=1), sample(6, seed=2))
    if channels_last:
        (x,) = leaves(x.to(memory_format=torch.channels_last))
    for make_grad in (
        lambda y: torch.ones((), dtype=y.dtype).expand_as(y),
        lambda y: sample(2, 6, 5, 3).to(memory_format=torch.channels_last),
        lambda y: sample(2, 5, 3, 6).permute(0, 3, 1, 2)[..., [2, 0, 1]],
        lambda y: sample(2, 6, 5, 6)[..., ::2],
    ):
        for function, theirs in (
            (lambda: group_norm(x, 2, weight, bias, backend=backend), lambda: F.group_norm(x, 2, weight, bias)),
            (
                lambda: layer_norm(x, 6, weight, bias, channel_dim=1, backend=backend),
                lambda: F.layer_norm(x.movedim(1, -1), (6,), weight, bias).movedim(-1, 1),
            ),
        ):
            y, want = function(), theirs()
            got = torch.autograd.grad(y, (x, weight, bias), make_grad(y))
            torch.testing.assert_close(
                got, torch.autograd.grad(want, (x, weight, bias), make_grad(y)), rtol=1e-11, atol=1e-11
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", SERVING)
def test_a_residual_is_added_in_the_dtype_of_the_input(backend: str, dtype: torch.dtype) -> None:
    x, residual = sample(5, 33, dtype=dtype), sample(5, 33, dtype=dtype, seed=1) * 100
    layer = syncnorm.LayerNorm(33, backend=backend)  # parameters stay float32
    y, h = layer(x, residual)
    assert torch.equal(h, x + residual) and y.dtype == dtype
    want = F.layer_norm(h.double(), (33,))
    torch.testing.assert_close(y.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "an image [H, W, C] turned": lambda x: x[0].movedim(0, -1).contiguous().movedim(-1, 0)[None],
    "neither": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "one channel": lambda x: x[:, :1].clone(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("affine", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_parameters_alone(backend: str, affine: tuple[str, ...], samples: int, layout: str) -> None:
    # torch's own operator crashes in some of these
    laid_out = LAYOUTS[layout](sample(samples, 4, 5, 3))
    channels = laid_out.size(1)
    groups = min(2, channels)
    parameters = [sample(channels, seed=seed).requires_grad_() for seed, _ in enumerate(affine, 1)]

    def loss(parameters: list[Tensor], x: Tensor, activation: str | None) -> Tensor:
        named = dict(zip(affine, parameters, strict=True))
        return group_norm(x, groups, **named, activation=activation, backend=backend).pow(3).sum()

    for activation in (None, "silu"):
        wide = dict(zip(affine, (t.view(-1, 1, 1) for t in parameters), strict=True))
        y = F.group_norm(laid_out.contiguous(), groups) * wide.get("weight", 1) + wide.get("bias", 0)
        want = torch.autograd.grad((y if activation is None else F.silu(y)).pow(3).sum(), parameters)
        for needs_grad in (False, True):
            y = loss(parameters, laid_out.detach().requires_grad_(needs_grad), activation)
            torch.testing.assert_close(torch.autograd.grad(y, parameters), want, rtol=1e-10, atol=1e-10)
        if backend != "native":
            torch.testing.assert_close(tuple(torch.func.grad(loss)(parameters, laid_out.detach(), activation)), want)
        if backend == "aten" and layout == "channels last":
            torch._dynamo.reset()
            y = torch.compile(loss, backend="aot_eager")(parameters, laid_out.detach(), activation)
            torch.testing.assert_close(torch.autograd.grad(y, parameters), want)


def test_an_activation_in_place_may_follow() -> None:
    x, weight = leaves(sample(2, 4, 3), sample(4, seed=1))
    for backend in SERVING:
        y = group_norm(x, 2, weight, backend=backend).relu_()
        z = layer_norm(x, 3, None, None, backend=backend).mul_(2)
        got = torch.autograd.grad((y.pow(2).sum() + z.pow(3).sum()), (x, weight))
        want = F.relu(F.group_norm(x, 2, weight)).pow(2).sum() + (2 * F.layer_norm(x, (3,))).pow(3).sum()
        torch.testing.assert_close(got, torch.autograd.grad(want, (x, weight)), rtol=1e-11, atol=1e-11)


def test_empty_inputs() -> None:
    for backend in SERVING:
        x = torch.empty(0, 4, 3, requires_grad=True)
        weight = torch.ones(4, requires_grad=True)
        y = group_norm(x, 2, weight, activation="silu", backend=backend)
        z, h = rms_norm(x, 3, residual=x, backend=backend)
        (y.sum() + z.sum() + h.sum()).backward()
        assert y.shape == z.shape == h.shape == x.grad.shape == (0, 4, 3) and torch.equal(weight.grad, torch.zeros(4))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_one_value_per_group_gives_the_activated_bias(activation: str) -> None:
    bias = sample(4)
    y = group_norm(sample(2, 4, 1, 1), 4, None, bias, activation=activation)
    torch.testing.assert_close(y, PLAIN[activation](bias).view(1, 4, 1, 1).expand(2, 4, 1, 1), rtol=0, atol=0)


def test_every_transform_of_torch_func() -> None:
    x, weight = sample(3, 2, 5), sample(5, seed=1)
    for function, theirs in (
        (lambda x: layer_norm(x, 5, weight).pow(2).sum(), lambda x: F.layer_norm(x, (5,), weight).pow(2).sum()),
        (lambda x: rms_norm(x, 5, weight, 1e-5).sum(), lambda x: F.rms_norm(x, (5,), weight, 1e-5).sum()),
        (
            lambda x: group_norm(x[None], 1, activation="silu").pow(2).sum(),
            lambda x: F.silu(F.group_norm(x[None], 1)).pow(2).sum(),
        ),
    ):
        for transform in (
            torch.func.grad, torch.func.jacfwd, torch.func.hessian,
            lambda f: torch.func.vmap(torch.func.grad(f)), lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        ):  # fmt: skip
            torch.testing.assert_close(transform(function)(x), transform(theirs)(x), rtol=1e-9, atol=1e-9)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.randn_like(x))
            got, want = (forward_ad.unpack_dual(f(dual)).tangent for f in (function, theirs))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", SERVING)
def test_compiles_in_one_graph_forward_and_backward(backend: str) -> None:
    x, residual, weight = leaves(sample(3, 6, 4), sample(3, 6, 4, seed=1), sample(4, seed=2))
    scale, bias = leaves(sample(6, seed=3), sample(6, seed=4))

    def function(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        y, h = rms_norm(x, 4, weight, 1e-5, residual=residual, backend=backend)
        z = layer_norm(y, 4, weight, p_bias, backend=backend)
        z = layer_norm(
            z.repeat(1, 1, 3), 6, scale, bias, channel_dim=1, residual=residual.repeat(1, 1, 3), backend=backend
        )
        z = (z[0].relu_() * z[1])[..., :4]
        z = group_norm(z + h, 2, scale, bias, activation="silu", backend=backend)
        return group_norm(z, 3, scale, backend=backend).relu_().pow(2).sum()

    p_bias = sample(4, seed=5)
    inputs = (x, residual, weight, scale, bias)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, function))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_an_exported_program_needs_no_operators_of_ours() -> None:
    layers = nn.Sequential(
        syncnorm.LayerNorm(4), syncnorm.RMSNorm(4), syncnorm.GroupNorm(6, 2, activation="silu")
    ).eval()
    x = sample(3, 6, 4, dtype=torch.float32)
    program = torch.export.export(layers, (x,))
    assert not [node for node in program.graph.nodes if "syncnorm" in str(node.target)]
    torch.testing.assert_close(program.module()(x), layers(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_rms_norm_holds_operators_that_others_know() -> None:
    traced = torch.jit.trace(syncnorm.RMSNorm(6), torch.randn(2, 6))
    assert "_fused_rms_norm" not in str(traced.inlined_graph)


def test_autocast_leaves_the_dtype_of_the_input() -> None:
    x = sample(4, 6, dtype=torch.bfloat16)
    for layer in (syncnorm.LayerNorm(6), syncnorm.RMSNorm(6), syncnorm.GroupNorm(6, 2, activation="silu")):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16 and layer(x.float()).dtype == torch.float32


@pytest.mark.parametrize("backend", ["native", "aten", "reference"])
def test_a_backward_within_autocast_is_as_precise(backend: str) -> None:
    x = sample(4, 6, dtype=torch.float32).requires_grad_()
    for layer in (syncnorm.LayerNorm(6, backend=backend), syncnorm.RMSNorm(6, backend=backend)):
        want = torch.autograd.grad(layer(x).pow(3).sum(), x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.autograd.grad(layer(x).pow(3).sum(), x)[0], want)


def test_bad_requests_are_refused() -> None:
    x = torch.randn(4, 6)
    for residual in (torch.randn(4, 1), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, device="meta")):
        with pytest.raises(ValueError, match=r"residual must have the shape, dtype and device of the input, got \[4, "):
            syncnorm.LayerNorm(6)(x, residual)
        with pytest.raises(ValueError, match=r"residual must have the shape, dtype and device"):
            rms_norm(x, 6, residual=residual)
    with pytest.raises(ValueError, match=r"activation must be None or one of \['relu', .*\], got 'tanh'"):
        syncnorm.GroupNorm(4, 2, activation="tanh")
    with pytest.raises(ValueError, match=r"activation must be None or one of"):
        group_norm(x, 2, activation="tanh")
    for make_layer in (
        lambda: syncnorm.LayerNorm(6, backend="fast"), lambda: syncnorm.RMSNorm(6, backend="fast"),
        lambda: syncnorm.GroupNorm(6, 2, backend="fast"), lambda: syncnorm.InstanceNorm2d(6, backend="fast"),
        lambda: layer_norm(x, 6, backend="fast"), lambda: instance_norm(x[..., None], backend="fast"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"backend must be one of \['auto', .*'reference'\], got 'fast'"):
            make_layer()
    with pytest.raises(SyncNormError, match=r"backend='native' was asked for and cannot run: .*on meta"):
        layer_norm(x.to("meta"), 6, backend="native")


def test_what_a_layer_says_of_itself() -> None:
    assert "activation='leaky_relu', negative_slope=0.2, backend='aten'" in repr(
        syncnorm.GroupNorm(4, 2, activation="leaky_relu", negative_slope=0.2, backend="aten")
    )
    assert "backend='aten'" in repr(syncnorm.LayerNorm(4, backend="aten"))
    assert "backend" not in repr(syncnorm.RMSNorm(4))
