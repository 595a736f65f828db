"""The graph of one module's own code, where torch.fx provably sees all that the code does.

Tracing runs ``forward`` once on stand-ins for tensors, so what it cannot see would be lost without a word: branches on the
training flag or on types, attributes that are written, contexts such as ``no_grad``, real tensor operations, random
numbers. Each of these is looked for here, and ends in :class:`UntraceableError`.
"""

import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["UntraceableError", "graphs_of", "hook_dicts", "required_arguments"]

_MADE_OF = (bool, int, float, str, type(None))
# Where code of torch asks for the type of a stand-in on its own behalf.
_TORCHS_OWN = ("torch.fx", "torch.utils._pytree", "torch.overrides", "torch.nn.modules.module")
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")


class UntraceableError(Exception):
    """Why the code of a module cannot be followed, in words."""


def graphs_of(root: nn.Module, inline: Iterable[nn.Module]) -> dict[bool, fx.Graph]:
    """What ``type(root).forward`` does in training (True) and in evaluation (False), with its required arguments alone.

    Args:
        root: The module.
        inline: Modules below it that are traced through; calls of all others are nodes.

    Raises:
        UntraceableError: If something in the code escapes torch.fx, or depends on the gradient mode.
    """
    inline = [*inline]
    with _kept([root, *inline]):
        graphs = {mode: _trace(root, inline, training=mode) for mode in (True, False)}
        with torch.no_grad():
            if _code(_trace(root, inline, training=True)) != _code(graphs[True]):
                raise UntraceableError("its code asks whether gradients are recorded")
    return graphs


def required_arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of ``forward`` that have no default.

    Raises:
        UntraceableError: If there is no such code, or it takes any number of arguments.
    """
    function = type(module).forward
    if not inspect.isfunction(function) or function is nn.Module.forward:
        raise UntraceableError("it has no forward of its own")
    _, *parameters = inspect.signature(function).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise UntraceableError("its forward takes any number of arguments")
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise UntraceableError("its forward has a keyword argument without a default")
    return tuple(p.name for p in required)


def hook_dicts(module: nn.Module) -> list[dict[Any, Any]]:
    """Where hooks on calls of ``module`` are."""
    return [value for name, value in vars(module).items() if name.endswith("_hooks") and "state_dict" not in name]


def _trace(root: nn.Module, inline: list[nn.Module], *, training: bool) -> fx.Graph:
    for module in (root, *inline):
        module.__dict__["training"] = training
    tracer = _Tracer(inline, required_arguments(root))
    seeds = random.getstate()
    try:
        with _NoOperations(tracer):
            graph = tracer.trace(root)
    except UntraceableError:
        raise
    except Exception as error:  # whatever the user's code, or torch.fx, raises on a stand-in
        told = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise UntraceableError(tracer.refused or told) from error
    finally:
        drawn = random.getstate() != seeds
        random.setstate(seeds)
    if tracer.refused or drawn:
        raise UntraceableError(tracer.refused or "it draws random numbers in Python")
    return graph


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


@contextmanager
def _kept(modules: list[nn.Module]) -> Iterator[None]:
    """See that nothing in ``modules`` is written to within, and undo it where it is."""
    before = [(module, _contents(vars(module))) for module in modules]
    try:
        yield
    finally:
        written = []
        for module, kept in before:
            vars(module)["training"] = kept["training"]
            if not _same(_contents(vars(module)), kept):
                written.append(type(module).__name__)
                vars(module).clear()
                vars(module).update(kept)
        if written:
            raise UntraceableError(f"its code writes to attributes of {written[0]}")


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.copy() if type(v) in (list, dict, set) and not k.endswith("_hooks") else v for k, v in attributes.items()
    }


def _same(now: Any, before: Any) -> bool:
    if type(now) is type(before) and isinstance(now, dict):
        return now.keys() == before.keys() and all(_same(now[key], before[key]) for key in before)
    if type(now) is type(before) and isinstance(now, list):
        return len(now) == len(before) and all(map(_same, now, before))
    return now is before or (isinstance(now, (*_MADE_OF, set)) and type(now) is type(before) and bool(now == before))


class _Tracer(fx.Tracer):
    """torch.fx's, which refuses what it would get wrong."""

    def __init__(self, inline: list[nn.Module], required: tuple[str, ...]) -> None:
        super().__init__()
        self.inline, self.required = {id(module) for module in inline}, required
        self.state, self.refused = _global_state(), ""

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        # Only what must be given is a stand-in; the rest has its default, so that `mask is None` is answered rightly.
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.required)]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(m) in self.inline:
            return type(m).forward(m, *args, **kwargs)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _StandIn:
            return a.node
        if isinstance(a, torch.Tensor) and not self._has(a):
            self.refuse("it uses a tensor that belongs to no module")
        return super().create_arg(a)

    def _has(self, tensor: torch.Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is t for t in (*self.root.parameters(), *self.root.buffers()))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _global_state() != self.state:
            self.refuse("part of it runs under no_grad, autocast or the like")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its code branches on values")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refuse("its code loops over a tensor")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("its code takes a mapping apart")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def refuse(self, why: str) -> NoReturn:
        self.refused = self.refused or why  # remembered: the user's code may catch the exception
        raise UntraceableError(why)


class _StandIn(fx.Proxy):
    """A proxy that notices when user code asks what it is: the answer would not be that of a tensor."""

    @property
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") == "torch.nn.parameter":  # for its asker
            frame = frame.f_back
        if not frame.f_globals.get("__name__", "").startswith(_TORCHS_OWN):
            self.tracer.refuse("its code asks for the type of a tensor")  # type: ignore[attr-defined]
        return _StandIn

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("a stand-in stays what it is")

    def __index__(self) -> int:
        return self.tracer.refuse("its code makes a number of a value")  # type: ignore[attr-defined, no-any-return]

    __int__ = __float__ = __index__


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    function = getattr(operator, f"i{name}")
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in _IN_PLACE:  # which torch.fx takes for `x = x + y`, and forgets that others hold x
    setattr(_StandIn, f"__i{_name}__", _in_place(_name))


class _NoOperations(TorchDispatchMode):
    """Nothing is computed while tracing: what is, would be a constant afterwards, or has changed a buffer."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tracer.refuse(f"it computes {func} on tensors of its own")


def _global_state() -> tuple[Any, ...]:
    devices = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
