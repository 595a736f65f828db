"""Tier: no process. What every method must bear: compile, export, copies, half precision, no samples, 1×1 maps, layouts."""

import copy
import io
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from syncnorm import modules
from syncnorm.errors import SyncNormError
from tests.catalogue import ELSEWHERE, METHODS, Method, inputs, layer

MAPS = [method for method in METHODS if method.maps]
TRACED = [method for method in METHODS if not method.variant]


def over(methods: list[Method]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


@pytest.fixture(autouse=True)
def expect_known_faults(request: pytest.FixtureRequest) -> None:
    method = getattr(request.node, "callspec", None) and request.node.callspec.params.get("method")
    for pattern, why in method.faults.items() if method else ():
        if re.search(pattern, request.node.name):
            request.applymarker(pytest.mark.xfail(reason=why, strict=True))


def results(module: nn.Module, xs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, gradients of inputs and parameters, and buffers after one step."""
    xs = tuple(x.detach().requires_grad_() for x in xs)
    y = module(*xs)
    torch.manual_seed(13)
    loss = (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum()
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, [*xs, *parameters.values()], allow_unused=True)
    names = [f"dx{i}" for i in range(len(xs))] + [f"d{name}" for name in parameters]
    found = {"y": y.detach()} | {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-11) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def test_every_public_layer_is_registered() -> None:
    layers = {
        name
        for name in modules.__all__
        if isinstance(getattr(modules, name), type) and issubclass(getattr(modules, name), nn.Module)
    }
    registered = {method.name.split(" ")[0] for method in METHODS}
    missing = layers - registered - ELSEWHERE.keys()
    assert not missing, f"add {sorted(missing)} to METHODS in tests/catalogue.py"
    assert registered <= set(modules.__all__), registered - set(modules.__all__)


@over(METHODS)
def test_every_parameter_gets_a_gradient(method: Method) -> None:
    module, xs = layer(method), inputs(method)
    found = results(module, xs)
    assert {f"d{name}" for name, parameter in module.named_parameters() if parameter.requires_grad} <= found.keys()
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())
    assert repr(module)


@over(TRACED)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_both_orders_equal_finite_differences(method: Method, training: bool) -> None:
    if training and method.constants:
        pytest.skip(f"in training {method.constants} are constants to the gradient")
    module, xs = layer(method), inputs(method, space=2)
    results(module, xs)  # running statistics that are not what they start as
    module.train(training)
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if "rho" in parameters:
        parameters["rho"] = parameters["rho"] / 4  # outside [0, 1] its gradient is that of the nearer end, by design

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(parameters, tensors[len(xs) :], strict=True))
        named |= {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(module, named, tensors[: len(xs)])

    tensors = [t.clone().requires_grad_() for t in (*xs, *parameters.values())]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@over(TRACED)
def test_compiles_in_one_graph(method: Method) -> None:
    module, xs = layer(method), inputs(method)
    want = results(copy.deepcopy(module), xs)
    torch._dynamo.reset()
    module.compile(fullgraph=True, backend="aot_eager")
    assert_same(results(module, xs), want)


@over(TRACED)
def test_exports_in_evaluation(method: Method) -> None:
    module, xs = layer(method).eval(), inputs(method)
    with torch.no_grad():
        want = module(*xs)
        exported = torch.export.export(module, xs)
        torch.testing.assert_close(exported.module()(*xs), want, rtol=0, atol=1e-11)


@over(TRACED)
@pytest.mark.parametrize("with_grad", [False, True])
def test_traces_in_evaluation(method: Method, with_grad: bool) -> None:
    module, xs = layer(method).eval(), inputs(method)
    with torch.set_grad_enabled(with_grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of checks of shapes
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module, xs)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        more = inputs(method, batch=method.shape[0] + 1)
        torch.testing.assert_close(torch.jit.load(buffer)(*more), module(*more), rtol=0, atol=1e-11)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, *xs: Tensor) -> Tensor:
        return checkpoint(self.inner, *xs, use_reentrant=self.use_reentrant)


@over(TRACED)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_step_is_the_step(method: Method, use_reentrant: bool) -> None:
    xs, steps = inputs(method), []
    for wrap in (lambda module: module, lambda module: Checkpointed(module, use_reentrant)):
        module = layer(method)
        leaves = [x.clone().requires_grad_() for x in xs]
        wrap(module)(*leaves).pow(3).sum().backward()
        steps.append([leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()] + list(module.buffers()))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-11, atol=1e-11)


@over(TRACED)
def test_evaluation_has_forward_mode_derivatives_and_is_vmapped(method: Method) -> None:
    module, (x, *more) = layer(method).eval().requires_grad_(False), inputs(method)
    tangent = torch.randn_like(x)
    step = 1e-6
    want = (module(x + step * tangent, *more) - module(x - step * tangent, *more)) / (2 * step)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent), *more)).tangent
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    both = torch.vmap(lambda x: module(x, *more))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both, torch.stack([module(x, *more), module(2 * x, *more)]), rtol=0, atol=1e-11)


@over(METHODS)
def test_state_goes_into_another_layer(method: Method) -> None:
    module, xs = layer(method), inputs(method)
    results(module, xs)  # buffers move, where there are any
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = method.make().double()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.eval()(*xs), module.eval()(*xs))


class Doubled(nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return 2 * parameter


@over(METHODS)
def test_a_parameter_may_be_what_a_parametrization_makes_of_it(method: Method) -> None:
    module, doubled, xs = layer(method).eval(), layer(method).eval(), inputs(method)
    for name, parameter in list(module.named_parameters()):
        parameter.data.mul_(2)
        if "." not in name:
            parametrize.register_parametrization(doubled, name, Doubled())
        else:
            doubled.get_parameter(name).data.mul_(2)
    assert torch.equal(doubled(*xs), module(*xs))


MADE_BY_OTHERS = ("weight_", "spectral_norm")  # torch's parametrizations have nothing to reset them
FITTED = ("Standardize", "MinMaxScale")
RESET = [(method.name, method.make) for method in METHODS if not method.name.startswith((*MADE_BY_OTHERS, *FITTED))]
RESET += [
    ("Standardize", lambda: modules.Standardize(6)),
    ("MinMaxScale", lambda: modules.MinMaxScale(6)),
    ("BatchNorm", lambda: modules.BatchNorm(6)),
    ("SyncBatchNorm (accumulating)", lambda: modules.SyncBatchNorm(6, accumulate=2)),
    ("BatchRenorm1d (limits)", lambda: modules.BatchRenorm1d(6, r_max=2.0, d_max=0.5)),
    ("InstanceNorm2d (tracking)", lambda: modules.InstanceNorm2d(6, track_running_stats=True)),
    ("LayerNormLSTM", lambda: modules.LayerNormLSTM(3, 4, 2)),
    ("BatchNormLSTM", lambda: modules.BatchNormLSTM(3, 4, 2, max_length=3)),
]
AT_RANDOM = (nn.Conv1d, nn.Conv2d, nn.Conv3d, modules.LayerNormLSTM, modules.BatchNormLSTM)


@pytest.mark.parametrize(("name", "make"), RESET, ids=[name for name, _ in RESET])
def test_born_on_meta_and_reset_it_is_as_new(name: str, make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        module = make()
    assert repr(module)
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().fill_(7 if tensor.dtype == torch.int64 else torch.nan)  # whatever the memory held
    for part in reversed(list(module.modules())):  # a layer after what it is made of
        if hasattr(part, "reset_parameters") or [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            part.reset_parameters()
    torch.manual_seed(0)
    new = make()
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, AT_RANDOM):
            part.reset_parameters()
    assert_same(dict(module.named_parameters()), dict(new.named_parameters()))
    assert_same(dict(module.named_buffers()), dict(new.named_buffers()))
    assert_same(module.state_dict(), new.state_dict())


def test_a_scaler_that_is_reset_is_fitted_to_nothing() -> None:
    for module in (modules.Standardize(6), modules.MinMaxScale(6)):
        module.fit(torch.randn(20, 6))
        module.reset_parameters()
        assert not module.is_fitted and module.count == 0
        with pytest.raises(SyncNormError, match="has no statistics yet"):
            module(torch.randn(3, 6))


def _emptied(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.to_empty(device="cpu").load_state_dict(state)


def _assigned(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, assign=True)


def _set(module: nn.Module, state: dict[str, Tensor]) -> None:
    """As ``from_pretrained`` of transformers does."""
    others = {
        name: torch.full_like(b, torch.nan, device="cpu") for name, b in module.named_buffers() if name not in state
    }
    for name, tensor in (state | others).items():
        setattr(module, name, nn.Parameter(tensor) if name in module._parameters else tensor)


@pytest.mark.parametrize("load", [_emptied, _assigned, _set])
def test_what_no_state_dict_has_is_as_new_after_meta(load: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    with torch.device("meta"):
        born = [modules.BatchRenorm1d(3, r_max=2.0, d_max=0.5), modules.MovingAverageBatchNorm1d(3, window=2)]
        born += [modules.SyncBatchNorm1d(3, accumulate=2)]
    x = torch.randn(8, 3)
    for module, new in zip(
        born,
        (
            modules.BatchRenorm1d(3, r_max=2.0, d_max=0.5),
            modules.MovingAverageBatchNorm1d(3, window=2),
            modules.SyncBatchNorm1d(3, accumulate=2),
        ),
        strict=True,
    ):
        assert repr(module) == repr(new)
        load(module, copy.deepcopy(new.state_dict()))
        for _ in range(2):
            assert torch.equal(module(x), new(x))
        assert_same(module.state_dict(), new.state_dict())


@over(METHODS)
def test_copies_and_pickles(method: Method) -> None:
    module, xs = layer(method).eval(), inputs(method)
    copied = [copy.deepcopy(module)]
    if method.pickles:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copied.append(torch.load(buffer, weights_only=False))
    want = module(*xs)
    for other in copied:
        assert torch.equal(other(*xs), want)
        for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
            assert mine.data_ptr() != theirs.data_ptr()


@over(METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_half_inputs_come_back_in_half(method: Method, dtype: torch.dtype, training: bool) -> None:
    module = layer(method).to(dtype if method.half_parameters else torch.float32).train(training)
    exact = layer(method).train(training)
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    xs = tuple(x.to(dtype) for x in inputs(method))
    mine, want = results(module, xs), results(exact, tuple(x.double() for x in xs))
    assert mine["y"].dtype == dtype and mine["dx0"].dtype == dtype
    # one rounding of the output and few of the gradients, which are sums of at most 60 terms
    for name, roundings in (("y", 2), ("dx0", 8)):
        scale = max(1.0, float(want[name].abs().max()))
        error = float((mine[name].double() - want[name]).abs().max())
        assert error <= roundings * torch.finfo(dtype).eps * scale, (name, error, scale)


@over(METHODS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_empty_batch_gives_an_empty_output(method: Method, training: bool, dtype: torch.dtype) -> None:
    module = layer(method).to(dtype if method.half_parameters else torch.float64).train(training)
    xs = tuple(x.to(dtype) for x in inputs(method, batch=0))
    shape = module(*(x.to(dtype) for x in inputs(method))).shape
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found = results(module, xs)
    assert found["y"].shape == (0, *shape[1:]) and found["y"].dtype == dtype
    for name, value in found.items():
        if name not in before:
            assert not value.any() and value.isfinite().all(), name
        elif not method.follows_weights:
            assert torch.equal(value, before[name]), name


@over(MAPS)
@pytest.mark.parametrize("training", [True, False])
def test_maps_of_one_value(method: Method, training: bool) -> None:
    module, xs = layer(method).train(training), inputs(method, space=1)
    found = results(module, xs)
    assert found["y"].shape[2:] == xs[0].shape[2:]
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())


@over(METHODS)
def test_strides_do_not_matter(method: Method) -> None:
    xs = inputs(method)
    want = results(layer(method), xs)
    x = xs[0]
    strided = torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0]
    swapped = x.transpose(0, -1).contiguous().transpose(0, -1)
    for other in (strided, swapped):
        assert not other.is_contiguous()
        assert_same(results(layer(method), (other, *xs[1:])), want)


@over(MAPS)
def test_channels_last_is_kept_and_does_not_matter(method: Method) -> None:
    xs = inputs(method)
    inner = xs[0].movedim(1, -1).contiguous().movedim(-1, 1)
    found = results(layer(method), (inner, *xs[1:]))
    assert_same(found, results(layer(method), xs))
    if method.keeps_layout:
        assert found["y"].movedim(1, -1).is_contiguous()
        assert layer(method)(*xs).is_contiguous()


@over(METHODS)
def test_training_is_evaluation_where_claimed(method: Method) -> None:
    module, xs = layer(method), inputs(method)
    same = torch.equal(module.eval()(*xs), module.train()(*xs))
    assert same == method.train_is_eval
