"""Tier: no process. Norms take in the activation and the sum that follow them: where it is proven, with the same results."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import syncnorm
from syncnorm.conversion._fused_forward import FusedForward
from tests.oracles import randomise_affine


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride > 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def resnet() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(stem, BasicBlock(4, 4), BasicBlock(4, 6, 2))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            randomise_affine(layer)
    return model


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (3, 3, 9, 9), generator=generator, dtype=torch.float64) + 0.3


def results(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Outputs and gradients in both modes, and the buffers."""
    found = {}
    for mode in (True, False):
        xs = [x.clone().requires_grad_() for x in inputs]
        model.zero_grad()
        y = model.train(mode)(*xs, **kwargs)
        y = y if isinstance(y, Tensor) else y.last_hidden_state
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        found |= {f"{mode} y": y.detach()} | {f"{mode} dx{i}": x.grad for i, x in enumerate(xs)}
        found |= {f"{mode} {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) <= tolerance * scale, name


def told(model: nn.Module, **options: Any) -> dict[str, str]:
    """By norm, what the plan says of fusion."""
    return {
        entry.name: entry.reason.rpartition("; ")[2] for entry in syncnorm.plan(model, fuse=True, **options).entries
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    kept: dict[str, Any] = {name: (type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()}
    return kept | {f"id {name}": id(value) for name, value in model.state_dict(keep_vars=True).items()}


def test_a_residual_network_computes_the_same_and_comes_back() -> None:
    model, plain = made(resnet), made(resnet)
    before = snapshot(model)
    assert told(model) == {
        "0.1": "takes in relu",
        "1.bn1": "takes in relu",
        "1.bn2": "takes in the sum and relu",
        "2.bn1": "takes in relu",
        "2.bn2": "not fused: BatchNorm2d (downsample.1) comes between it and the sum",
        "2.downsample.1": "takes in the sum and relu",
    }
    assert snapshot(model) == before
    syncnorm.convert(model, fuse=True)
    assert {name for name, m in model.named_modules() if "forward" in vars(m)} == {"0", "1", "2"}
    said = {text.split()[1]: text for text in syncnorm.explain(model).split("SyncBatchNorm2d(")[1:]}
    assert "takes in the sum and relu in the code of 1;" in said["1.bn2"]
    assert {name for name, text in said.items() if "because what follows is applied in the same pass" in text} == {
        name for name, text in said.items() if "takes in" in text
    }
    assert {name for name, text in said.items() if "takes in" not in text} == {"2.bn2"}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert repr(syncnorm.revert(copy.deepcopy(model))) == repr(plain)
    assert_same(results(model, images()), results(plain, images()))
    syncnorm.revert(model).train()
    assert snapshot(model) == before


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.grad_fn is not None
    return sum(kept.values())


def test_less_is_kept_for_the_backward() -> None:
    """A convolution keeps its input anyway. Without fusion the norm's input and the ReLU's output are kept, with it the
    former and a bit an element: of five maps of one size per block, three and a bit.
    """
    x = images(4, 4, 16, 16)
    plain, fused = (made(lambda: BasicBlock(4, 4)) for _ in range(2))
    syncnorm.convert(fused, fuse=True)
    one = x.numel() * 8
    assert kept_bytes(syncnorm.convert(plain), x) >= 5 * one  # type: ignore[arg-type]
    assert kept_bytes(fused, x) <= 4.2 * one


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_hugging_face_resnet(layer_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type=layer_type)
    model, plain = (made(lambda: transformers.ResNetModel(config)) for _ in range(2))
    before = snapshot(model)
    counts = told(model).values()
    assert [text[:8] for text in counts].count("takes in") == len(counts) - 1  # one sum has a norm on both sides
    syncnorm.convert(model, fuse=True)
    assert_same(results(model, images(2, 3, 24, 24)), results(plain, images(2, 3, 24, 24)))
    syncnorm.revert(model).train()
    assert snapshot(model) == before


class Written(nn.Module):
    """A norm, and what a function makes of its output and the input."""

    def __init__(self, code: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.code, self.scale = code, 2.0
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = self.conv(x)
        return self.code(self, h, self.norm(h), x) if extra is None else self.norm(h) * extra


TAKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "ReLU": (lambda self, h, y, x: self.act(y), "relu"),
    "LeakyReLU": (lambda self, h, y, x: self.leaky(y), "leaky_relu"),
    "SiLU in place": (lambda self, h, y, x: self.silu(y), "silu"),
    "GELU": (lambda self, h, y, x: self.gelu(y), "gelu"),
    "Identity": (lambda self, h, y, x: self.same(self.act(self.same(y))), "relu"),
    "functional.relu": (lambda self, h, y, x: functional.relu(y, inplace=True), "relu"),
    "torch.relu": (lambda self, h, y, x: torch.relu(y), "relu"),
    "relu_": (lambda self, h, y, x: y.relu_() * 2, "relu"),
    "functional.leaky_relu": (lambda self, h, y, x: functional.leaky_relu(y, 0.3), "leaky_relu"),
    "functional.silu": (lambda self, h, y, x: functional.silu(y), "silu"),
    "functional.gelu": (lambda self, h, y, x: functional.gelu(y), "gelu"),
    "a sum": (lambda self, h, y, x: (y + x).sigmoid(), "the sum"),
    "torch.add": (lambda self, h, y, x: torch.add(x, y).relu(), "the sum and relu"),
    "add_": (lambda self, h, y, x: functional.silu(y.add_(x)), "the sum and silu"),
    "a later operand": (lambda self, h, y, x: functional.gelu(self.other(x).tanh() + y), "the sum and gelu"),
    "a broken-up sum": (lambda self, h, y, x: (y + x.mean((2, 3), keepdim=True)).relu(), "the sum and relu"),
    "another dtype": (lambda self, h, y, x: (y + x.float()).relu(), "the sum and relu"),
    "somebody's own": (lambda self, h, y, x: self.own(y), "leaky_relu"),
    "mode": (lambda self, h, y, x: y.relu() if self.training else y.relu() * self.scale, "relu"),
}


class Swash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = 0.3

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        return functional.leaky_relu(x, self.slope, inplace)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "act": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "same": nn.Identity,
    "own": Swash,
    "other": lambda: nn.Conv2d(3, 3, 1),
}


def written(code: Callable[..., Any]) -> nn.Module:
    return made(lambda: Written(code, **{name: layer() for name, layer in LAYERS.items()}))


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken_in(case: str) -> None:
    code, took = TAKEN[case]
    model, plain = written(code), written(code)
    assert told(model) == {"norm": f"takes in {took}"}
    syncnorm.convert(model, fuse=True)
    assert isinstance(model.forward, FusedForward)
    assert_same(results(model, images()), results(plain, images()))


def into_the_norms(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    y += x.double()
    return y.relu()


def into_the_others(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    z = self.other(x.bfloat16())
    z += y
    return z.relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("code", "dtype"), [(into_the_norms, torch.float32), (into_the_others, torch.bfloat16)])
def test_a_sum_in_place_keeps_the_dtype_of_what_it_writes_to(code: Callable[..., Any], dtype: torch.dtype) -> None:
    model, plain = (written(code).float() for _ in range(2))
    for each in (model, plain):
        each.other.bfloat16()  # type: ignore[operator, union-attr]
    assert told(model) == {"norm": "takes in the sum and relu"}
    y = syncnorm.convert(model, fuse=True)(images().float())
    assert y.dtype == dtype
    torch.testing.assert_close(y, plain(images().float()))


def counted(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    self.scale += 1
    return y.relu()


def seen(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    self.last = y
    return y.relu()


def caught(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    try:
        return y.relu() if x.sum() > 0 else y
    except Exception:
        return y


def frozen(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return y.relu()


def narrow(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y.relu()


def into_the_input(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    z = x * 1
    z += y
    return z.relu() + z


def overtaken(self: Any, h: Tensor, y: Tensor, x: Tensor) -> Tensor:
    h.mul_(2)
    return (y + self.other(x)).relu()


ANOTHER = torch.ones(3, 1, 1, dtype=torch.float64)
LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "used twice": (lambda self, h, y, x: y.relu() + y, "its output is used 2 times"),
    "unused": (lambda self, h, y, x: h.relu(), "its output is not used"),
    "another activation": (lambda self, h, y, x: functional.hardswish(y), "what follows is hardswish"),
    "an approximation": (lambda self, h, y, x: functional.gelu(y, approximate="tanh"), "what follows is gelu"),
    "a convolution": (lambda self, h, y, x: self.other(y), "what follows is Conv2d (other)"),
    "a scaled sum": (lambda self, h, y, x: torch.add(y, x, alpha=2), "what follows is add"),
    "a number": (lambda self, h, y, x: (y + 1).relu(), "what is added to its output is not another tensor"),
    "itself": (lambda self, h, y, x: (y + y).relu(), "what is added to its output is not another tensor"),
    "into another tensor": (into_the_input, "the sum is written into a tensor that others may hold"),
    "its input overwritten": (overtaken, "mul_ comes between it and the sum"),
    "the end": (lambda self, h, y, x: y, "its output leaves (the model itself)"),
    "a number of it": (lambda self, h, y, x: y.relu() * int(x.sum()), "its code makes a number of a value"),
    "values": (lambda self, h, y, x: y.relu() if x.sum() > 0 else y, "its code branches on values"),
    "values, caught": (caught, "its code branches on values"),
    "types": (lambda self, h, y, x: y.relu() if isinstance(x, Tensor) else y, "its code asks for the type of a tensor"),
    "gradient mode": (lambda self, h, y, x: y.relu() if torch.is_grad_enabled() else y, "asks whether gradients are recorded"),
    "no_grad": (frozen, "part of it runs under no_grad, autocast or the like"),
    "autocast": (narrow, "part of it runs under no_grad, autocast or the like"),
    "chance": (lambda self, h, y, x: y.relu() if random.random() < 2 else y, "it draws random numbers in Python"),
    "an operation": (lambda self, h, y, x: y.relu() * torch.ones(1), "it computes aten.ones.default on tensors of its own"),
    "a foreign tensor": (lambda self, h, y, x: y.relu() * ANOTHER, "it uses a tensor that belongs to no module"),
    "a loop": (lambda self, h, y, x: torch.stack([z.relu() for z in y]), "its code loops over a tensor"),
    "a counter": (counted, "its code writes to attributes of Written"),
    "an attribute": (seen, "its code writes to attributes of Written"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_and_why(case: str) -> None:
    code, why = LEFT[case]
    model, plain = written(code), written(code)
    before = {name: value for name, value in vars(model).items() if name != "code"}
    (text,) = told(model).values()
    assert text.startswith("not fused: ") and text.endswith(why), text
    assert {name: value for name, value in vars(model).items() if name != "code"} == before
    syncnorm.convert(model, fuse=True)
    assert "forward" not in vars(model)
    if case not in ("the end", "unused", "no_grad", "its input overwritten"):  # nothing to differentiate
        assert_same(results(model, images()), results(plain, images()))


class Holding(nn.Module):
    """Calls its children in a way of its own, and cannot be followed."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.children_ = nn.ModuleList(children)

    def forward(self, *xs: Tensor) -> Tensor:
        (x,) = xs
        for child in self.children_:
            x = child(x)
        return x


def test_code_around_what_can_be_followed() -> None:
    model = nn.Sequential(Holding(nn.BatchNorm2d(3), nn.ReLU()), Holding(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
    assert told(model) == {
        "0.children_.0": "not fused: Holding (0) cannot be followed: its forward takes any number of arguments",
        "1.children_.0.0": "takes in relu",
    }


def test_across_modules_only_where_nothing_listens() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = nn.Sequential(inner, nn.ReLU())
    assert told(model) == {"0.1": "takes in relu"}
    handle = inner.register_forward_hook(lambda *_: None)
    assert told(model) == {"0.1": "not fused: its output leaves 0"}
    handle.remove()
    inner.forward = inner.forward  # type: ignore[method-assign]
    assert told(model)["0.1"] == "not fused: Sequential (0) cannot be followed: its forward was replaced on the object"


def test_hooks_that_are_there_keep_a_norm_as_it_is() -> None:
    for listened, why in (
        (1, "it has hooks, which would see another output"),
        (2, "2 has hooks, which would not be called"),
    ):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        model[listened].register_forward_hook(lambda *_: None)
        assert told(model) == {"1": f"not fused: {why}"}


def fused() -> Any:
    return syncnorm.convert(written(TAKEN["torch.add"][0]), fuse=True)


def runs_fused(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the call goes through the code that was made: the original one has an addition of its own."""
    y = model(*args, **kwargs)
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    return "AddBackward0" not in names


def test_what_changes_afterwards_is_respected() -> None:
    x = images()
    assert runs_fused(fused(), x)
    assert runs_fused(fused(), x=x)
    assert runs_fused(fused(), x, extra=None)

    seen: list[Tensor] = []
    model = fused()
    handle = model.norm.register_forward_hook(lambda module, args, y: seen.append(y))
    assert not runs_fused(model, x)
    assert bool((seen[0] < 0).any())  # what the norm alone computes
    handle.remove()
    assert runs_fused(model, x)

    model = fused()
    model.code = lambda self, h, y, x: y + x
    assert runs_fused(model, x)  # of attributes that are not plain data, it goes by how they were
    model.scale = 3.0
    assert not runs_fused(model, x)
    own: Any = syncnorm.convert(written(TAKEN["somebody's own"][0]), fuse=True)
    own.own.slope = 0.7  # a part of the code as it was
    torch.testing.assert_close(own.eval()(x), functional.leaky_relu(own.norm(own.conv(x)), 0.7))
    model = fused()
    model.norm = nn.BatchNorm2d(3).double()
    assert not runs_fused(model, x)
    for name in ("norm", "act"):  # as libraries do that wrap the forward of every module
        model = syncnorm.convert(written(TAKEN["ReLU"][0]), fuse=True).eval()
        h = model.conv(x)
        patched = model.get_submodule(name)
        patched.forward = lambda y, old=patched.forward: 3 * old(y)
        torch.testing.assert_close(model(x), model.act(model.norm(h)))
    model = fused()
    assert torch.equal(model.eval()(x, x), syncnorm.revert(copy.deepcopy(model))(x, x))  # another way through the code
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not runs_fused(model, x)
    sequence: Any = syncnorm.convert(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()).double(), fuse=True
    )
    torch.testing.assert_close(functional.silu(sequence.eval()[:2](x)), sequence(x))
    assert sequence.append(nn.Flatten())(x).dim() == 2


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_too_and_go_back(through: Any) -> None:
    model = syncnorm.convert(made(resnet), fuse=True)
    copied = through(model)
    assert copied[1].forward.block is copied[1]
    expected = results(made(resnet), images())
    assert_same(results(copied, images()), expected)
    assert copied[1].forward._program is not None
    assert snapshot(syncnorm.revert(copied).train()).keys() == snapshot(made(resnet)).keys()
    assert_same(results(model, images()), expected)


def test_layers_that_are_reverted_alone_still_compute_the_same() -> None:
    model = syncnorm.convert(made(resnet), fuse=True)
    for module in model.modules():
        if isinstance(module, syncnorm.modules.SyncStatistics):
            module.release()
    assert_same(results(model, images()), results(made(resnet), images()))
    assert isinstance(model[1].forward, FusedForward)


def test_twice_is_once_and_another_kind_later() -> None:
    model = syncnorm.convert(made(resnet), fuse=True)
    (entry, *_) = syncnorm.plan(model, fuse=True).entries
    assert (entry.action, entry.reason) == ("keep", "synchronised already; takes in relu")
    syncnorm.convert(model, fuse=True, strict=True)
    syncnorm.convert(model, "batch_renorm", r_max=1.0, d_max=0.0)
    assert_same(
        results(model, images()),
        results(syncnorm.convert(made(resnet), "batch_renorm", r_max=1.0, d_max=0.0), images()),
    )


def test_compiled_and_exported() -> None:
    model, plain = (made(lambda: BasicBlock(4, 4)) for _ in range(2))
    syncnorm.convert(model, fuse=True)
    x = images(2, 4, 5, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-12)
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), plain.eval()(x), rtol=0, atol=1e-12)
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, name: not any(True for _ in module.children())  # type: ignore[method-assign]
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    torch.testing.assert_close(traced(x), plain(x), rtol=0, atol=1e-12)


def test_group_norm_takes_in_an_activation() -> None:
    model, plain = (made(lambda: BasicBlock(4, 4)) for _ in range(2))
    assert told(model, to="group_norm", num_groups=2) == {
        "bn1": "takes in relu",
        "bn2": "not fused: what follows is iadd",
    }
    for each, fuse in ((model, True), (plain, False)):
        syncnorm.convert(each, "group_norm", num_groups=2, fuse=fuse)
    assert_same(results(model, images(2, 4, 6, 6)), results(plain, images(2, 4, 6, 6)))


@pytest.mark.filterwarnings("error")
def test_a_norm_that_activates_drops_the_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU()).double()
    (entry,) = syncnorm.plan(model, "evo_norm_s0", fuse=True).entries
    assert entry.reason.endswith("activates too; takes in relu")
    syncnorm.convert(model, "evo_norm_s0", fuse=True)
    x = images()
    assert torch.equal(model(x), model[1](model[0](x)))
    assert bool((model(x) < 0).any())
    syncnorm.revert(model)
    assert not bool((model(x) < 0).any())


class Activating(nn.Module):
    """One activation for two norms, a function, and code that depends on an attribute and an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.scale = nn.ReLU(inplace=True), 2.0

    def forward(self, x: Tensor, more: float = 0.0) -> Tensor:
        y = self.relu(self.bn1(self.conv(x))) * self.scale
        y = functional.silu(self.bn2(y))
        return self.relu(y - 0.3 + more)

    def without(self, x: Tensor, more: float = 0.0) -> Tensor:
        return self.relu(self.bn2(self.bn1(self.conv(x)) * self.scale) - 0.3 + more)


def activating(to: str) -> tuple[Activating, Tensor]:
    """A model whose norms activate, in evaluation, and an input to which it matters that nothing else does."""
    options = {"evo_norm_s0": {"num_groups": 2}}.get(to, {})
    model = syncnorm.convert(made(Activating), to, fuse=True, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("threshold"):
            nn.init.constant_(parameter, -0.3)
    return model, images(2, 4, 5, 5)


NORMS_THAT_ACTIVATE = pytest.mark.parametrize("to", ["evo_norm_s0", "evo_norm_b0", "filter_response_norm"])


@NORMS_THAT_ACTIVATE
@pytest.mark.parametrize("through", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_activation_that_was_dropped_stays_dropped_for_a_compiler(to: str, through: Any) -> None:
    model, x = activating(to)
    want = model.without(x)
    torch._dynamo.reset()
    compiled = torch.compile(through(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want, rtol=0, atol=1e-12)
    for strict in (True, False):
        exported = torch.export.export(through(model), (x,), strict=strict).module()
        torch.testing.assert_close(exported(x), want, rtol=0, atol=1e-12)


def _scaled(model: Activating) -> None:
    model.scale = 3.0


def _watched(model: Activating) -> None:
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        if module is not model.relu:  # torch lets no such hook see what is written to
            module.register_full_backward_hook(lambda *_: None)


@NORMS_THAT_ACTIVATE
@pytest.mark.parametrize("change", [_scaled, _watched, lambda model: model.bn1.train()])
def test_an_activation_that_was_dropped_stays_dropped_where_the_original_code_runs(to: str, change: Any) -> None:
    for through in (lambda model: model, copy.deepcopy):
        model, x = activating(to)
        model = through(model)
        want = copy.deepcopy(model)
        change(want), change(model)
        x = x.requires_grad_()
        assert torch.equal(model(x), want.without(x))
        assert torch.equal(model(x, more=1.0), want.without(x, more=1.0))
        assert not any("_compiled_call_impl" in vars(module) for module in model.modules())


def test_code_that_a_compiler_cannot_have_without_the_activation_is_refused_or_left_out() -> None:
    model, x = activating("evo_norm_s0")
    model.scale = 3.0
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model.without(x), rtol=0, atol=1e-12)
    with pytest.raises(
        syncnorm.SyncNormError, match="took out what activates the output of bn1, bn2, which activates its"
    ):
        torch.export.export(model, (x,), strict=False)


def test_the_switch() -> None:
    with pytest.raises(TypeError, match="fuse must be True or False, got 'yes'"):
        syncnorm.convert(made(resnet), fuse="yes")
    with pytest.raises(
        TypeError, match=r"got fuse=True\. It belongs to sync_batch_norm, .* group_norm, layer_norm, filter_res"
    ):
        syncnorm.convert(made(resnet), "switchable_norm", fuse=True)
    occupied = nn.Sequential(syncnorm.SyncBatchNorm2d(3, activation="relu"), nn.ReLU())
    assert syncnorm.plan(occupied, fuse=True).entries[0].reason == "synchronised already"


def test_a_run_gives_the_code_back() -> None:
    pytest.importorskip("lightning")
    surgery = syncnorm.SyncNorm(options={"fuse": True})._surgery
    model = made(resnet)
    before = snapshot(model)
    surgery.run(model, last=True)
    assert "forward" in vars(model[1])  # type: ignore[index]
    surgery.undo()
    assert snapshot(model) == before
