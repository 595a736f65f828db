"""Tier: no process. What the mathematics says of every method: invariances, identities of gradients, limits of averages.

An eps of 1e-30 stands for 0, at which the invariances are exact; where eps takes part, the test has its term.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from syncnorm import modules
from tests.catalogue import METHODS, Method, inputs, layer

BY_NAME = {method.name: method for method in METHODS}
EPS = 1e-30
# A few hundred float64 operations on values of about 10.
TOLERANCE = 1e-11
# What does not hold fails by far more than rounding.
APART = 1e-3

# For c > 0: f(c·x) = f(x), f(x + c) = f(x), f(-x) = -f(x); without the bias.
INVARIANT = {
    "SyncBatchNorm": (True, True, True),
    "SyncBatchNorm2d": (True, True, True),
    "BatchRenorm2d": (True, True, True),  # without correction
    "GhostBatchNorm2d": (True, True, True),
    "FrozenBatchNorm2d": (False, False, False),
    "GroupNorm": (True, True, True),
    "GroupNorm (vectors)": (True, True, True),
    "LayerNorm": (True, True, True),
    "LayerNorm (channels)": (True, True, True),
    "RMSNorm": (True, False, True),
    "RMSNorm (partial)": (True, False, True),
    "RMSNorm (channels)": (True, False, True),
    "InstanceNorm2d": (True, True, True),
    "FilterResponseNorm": (True, False, True),
    "EvoNormS0": (False, False, False),
    "SwitchableNorm2d": (True, True, True),
    "BatchInstanceNorm2d": (True, True, True),
    "EvoNormB0": (True, False, False),
    "ConditionalNorm": (True, True, False),
    "AdaptiveInstanceNorm": (True, True, False),
    "DynamicTanh": (False, False, True),
}


def without_eps(method: Method) -> nn.Module:
    module = layer(method)
    for part in module.modules():
        if hasattr(part, "eps"):
            part.eps = EPS
        if isinstance(part, modules.BatchRenorm2d):
            part.r_max, part.d_max = 1.0, 0.0
        if isinstance(part, modules.FrozenBatchNorm2d):
            part.running_mean.normal_()
        if getattr(part, "bias", None) is not None:
            part.bias.data.zero_()
    return module


def gradient(module: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = module(x, *more)
    return torch.autograd.grad((y.pow(3) * torch.randn_like(y)).sum(), x)[0]


def over(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


@over(list(INVARIANT))
def test_scale_shift_and_sign_of_the_input(name: str) -> None:
    module, (x, *more) = without_eps(BY_NAME[name]), inputs(BY_NAME[name])
    y = module(x, *more)
    found = [(module(u, *more) - v).abs().max() for u, v in ((3.7 * x, y), (x + 2.3, y), (-x, -y))]
    for error, holds in zip(found, INVARIANT[name], strict=True):
        assert error <= TOLERANCE if holds else error > APART, found


@over([name for name, (scale, *_) in INVARIANT.items() if scale])
def test_a_norm_that_forgets_scale_and_shift_has_no_derivative_along_them(name: str) -> None:
    method = BY_NAME[name]
    module, (x, *more) = without_eps(method), inputs(method)
    dx = gradient(module, x, *more)
    # Euler on a function of degree 0, of each sample where samples do not meet
    dims = [d for d in range(x.dim()) if d > 0 or not method.train_is_eval]
    assert (x * dx).sum(dims).abs().max() <= TOLERANCE * dx.abs().max()
    assert dx.abs().max() > APART
    if INVARIANT[name][1]:
        assert dx.sum(dims).abs().max() <= TOLERANCE * dx.abs().max()
    # Weights in front of it: <w, dw> = 0, and the gradient at c·w is 1/c of it.
    channel = x.dim() - 1 if name in ("LayerNorm", "RMSNorm", "RMSNorm (partial)") else 1
    torch.manual_seed(6)
    w = torch.randn(6, 6, dtype=torch.float64)

    def network(w: Tensor) -> Tensor:
        return module((x.movedim(channel, -1) @ w.T).movedim(-1, channel), *more)

    dw = gradient(network, w)
    assert (w * dw).sum().abs() <= TOLERANCE * dw.abs().max()
    torch.testing.assert_close(gradient(network, 4 * w), dw / 4, rtol=0, atol=TOLERANCE * float(dw.abs().max()))


# What the output of norm(W x) does not see: W and a row of it times c, a vector added to each row of W; all samples and one
# of them times c, a vector added to each sample. Zhang & Sennrich (2019), table 1.
TABLE = {
    "SyncBatchNorm": (True, False, True, True, True, False),
    "LayerNorm": (True, True, False, True, False, True),
    "RMSNorm": (True, False, False, True, False, True),
    "RMSNorm (partial)": (True, False, False, True, False, True),
    "GroupNorm (vectors)": (True, True, False, True, False, True),
}


@over(list(TABLE))
def test_invariances_of_a_layer_with_weights_are_those_of_the_table(name: str) -> None:
    module = without_eps(BY_NAME[name])
    torch.manual_seed(7)
    x, w, vector = (torch.randn(n, 6, dtype=torch.float64) for n in (5, 6, 1))
    one = torch.ones(5, 1, dtype=torch.float64)
    one[2] = 2.5
    first = torch.ones(6, 1, dtype=torch.float64)
    first[0] = 2.5
    cases = [(x, 2.5 * w), (x, w + vector), (x, first * w), (2.5 * x, w), (x + vector, w), (one * x, w)]
    want = module(x @ w.T)
    for (u, v), holds in zip(cases, TABLE[name], strict=True):
        error = (module(u @ v.T) - want).abs().max()
        assert error <= TOLERANCE if holds else error > APART


@over([method.name for method in METHODS if not method.variant])
@pytest.mark.parametrize("what", ["samples", "space"])
def test_the_order_of_samples_and_of_space_does_not_matter(name: str, what: str) -> None:
    method = BY_NAME[name]
    if what == "space" and not method.maps:
        pytest.skip("no space")
    order = [1, 0, 3, 2, 4] if "Ghost" in name else [2, 0, 1]  # ghosts are neighbours

    def rearrange(t: Tensor) -> Tensor:
        return t[order] if what == "samples" else t.flip(list(range(2, t.dim())))

    x, *more = inputs(method)
    want = results(layer(method), (x, *more), same=lambda t: t)
    if what == "samples":
        more = [rearrange(t) for t in more]
    got = results(layer(method), (rearrange(x), *more), same=rearrange)
    for key, value in want.items():
        value = rearrange(value) if key in ("y", "dx") else value
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got[key], value, rtol=0, atol=TOLERANCE * scale, msg=lambda m, k=key: f"{k}: {m}")


def results(module: nn.Module, xs: tuple[Tensor, ...], same: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers of a loss whose weights are rearranged by ``same``."""
    x = xs[0].clone().requires_grad_()
    y = module(x, *xs[1:])
    torch.manual_seed(5)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y.pow(3) * same(torch.randn_like(y))).sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["dx", *parameters], gradients, strict=True)), **dict(module.named_buffers())}


# The values that share a mean and a variance, as rows.
SETS: dict[str, Callable[[Tensor], Tensor]] = {
    "SyncBatchNorm2d": lambda t: t.transpose(0, 1).flatten(1),
    "GhostBatchNorm2d": lambda t: torch.cat([t[:2], t[2:4]], 1).transpose(0, 1).flatten(1),
    "InstanceNorm2d": lambda t: t.flatten(2).flatten(0, 1),
    "GroupNorm": lambda t: t.reshape(len(t) * 3, -1),
    "LayerNorm": lambda t: t.flatten(0, 1),
}


@over(list(SETS))
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_what_is_left_of_the_gradient_along_the_normalised_input_is_the_share_of_eps(name: str, backend: str) -> None:
    eps = 0.3
    module, x = layer(BY_NAME[name]), inputs(BY_NAME[name])[0]
    x = x[:2].repeat(2, 1, 1, 1) + torch.randn_like(torch.cat([x[:2]] * 2)) if name == "GhostBatchNorm2d" else x
    module.eps, module.backend = eps, backend
    torch.manual_seed(8)
    g = torch.randn_like(x)
    shape = (6,) if name == "LayerNorm" else (6, 1, 1)
    u = SETS[name](g * module.weight.detach().view(shape))
    x.requires_grad_()
    dx = SETS[name](torch.autograd.grad((module(x) * g).sum(), x)[0])
    values = SETS[name](x.detach())
    var, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    s = (var + eps).rsqrt()
    x_hat = (values - mean) * s
    torch.testing.assert_close(dx.sum(1), torch.zeros(len(dx), dtype=dx.dtype), rtol=0, atol=TOLERANCE)
    want = s * (u * x_hat).sum(1, keepdim=True) * eps * s.square()
    torch.testing.assert_close((dx * x_hat).sum(1, keepdim=True), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "make",
    [modules.SyncBatchNorm2d, modules.BatchRenorm2d, modules.SwitchableNorm2d, modules.BatchInstanceNorm2d,
     modules.EvoNormB0, lambda n, **options: modules.GhostBatchNorm2d(n, 4, **options)],
    ids=["SyncBatchNorm2d", "BatchRenorm2d", "SwitchableNorm2d", "BatchInstanceNorm2d", "EvoNormB0", "GhostBatchNorm2d"],
)  # fmt: skip
def test_without_momentum_running_statistics_are_the_averages_of_those_of_the_batches(
    make: Callable[..., nn.Module],
) -> None:
    module = make(3, momentum=None).double()
    batches = [torch.randn(4, 3, 2, 5, dtype=torch.float64) * (k + 1) + k for k in range(5)]
    for batch in batches:
        module(batch)
    dims = (0, 2, 3)
    var = torch.stack([batch.var(dims, correction=1) for batch in batches]).mean(0)
    mean = torch.stack([batch.mean(dims) for batch in batches]).mean(0)
    assert module.num_batches_tracked == 5
    torch.testing.assert_close(module.running_var, var, rtol=1e-13, atol=0)
    if module.running_mean is not None:
        torch.testing.assert_close(module.running_mean, mean, rtol=1e-13, atol=1e-13)


@over(["SyncBatchNorm2d", "BatchRenorm2d", "GhostBatchNorm2d", "FrozenBatchNorm2d"])
def test_evaluation_folds_into_the_convolution_before_it(name: str) -> None:
    norm = layer(BY_NAME[name])
    for _ in range(3):
        norm(torch.randn(4, 6, 3, 3, dtype=torch.float64) * 2 + 1)
    conv = nn.Conv2d(3, 6, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    conv.eval(), norm.eval()
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)), rtol=0, atol=1e-13)
