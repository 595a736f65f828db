"""A module's own code with its norms taking in what follows them: on the object, under ``forward``, as long as it holds.

Nothing else of the model changes. Where the code may no longer be the same, because hooks were added or an attribute was
changed since, the original code runs.
"""

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _globals
from torch.overrides import TorchFunctionMode

from syncnorm.conversion._match import ACTIVATIONS, Takes, fuse_graph
from syncnorm.conversion._trace import UntraceableError, graphs_of, hook_dicts, required_arguments
from syncnorm.core.activation import Activation
from syncnorm.core.traced import constant_while_traced
from syncnorm.errors import SyncNormError
from syncnorm.modules import EvoNormB0, EvoNormS0, FilterResponseNorm, GroupNorm, SyncStatistics

__all__ = ["FusedForward", "apply", "takes_in", "unfuse"]

_PLAIN = (bool, int, float, str, type(None))


class FusedForward:
    """What stands in for ``block.forward``.

    Args:
        block: Whose code it is.
        norms: Names of the norms in it.
        inline: Names of the modules below it whose code is part of it.
    """

    def __init__(self, block: nn.Module, norms: Sequence[str], inline: Sequence[str]) -> None:
        self.block, self.norms, self.inline = block, tuple(norms), tuple(inline)
        self._program: _Program | None = None
        self._key = _known(self)
        # What a compiler would bring back, and every other who runs the original code.
        self._dropped = tuple(name for name in self.took if _activates(block.get_submodule(name)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling or self._dropped:  # else a compiler fuses for itself, and sees through the original code
            program = self._traced_program() if compiling else self.program
            given = program.arguments(args, kwargs)
            if given is not None and program.holds(self._dropped):
                return program.code[self.block.training](self.block, *given)
        if not self._dropped:
            return type(self.block).forward(self.block, *args, **kwargs)
        if compiling or any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            raise SyncNormError(
                f"convert(fuse=True) took out what activates the output of {', '.join(self._dropped)}, which activates itself. "
                f"{type(self.block).__name__} has other hooks, attributes, submodules or arguments by now, and its code of now "
                "cannot be traced without. Undo that, or compile the parts around this module."
            )
        forward = type(self.block).forward
        if "torch._dynamo" in sys.modules:  # which would look through the calls in what it compiles of this
            forward = torch.compiler.disable(forward)
        with _WithoutActivation([self.block.get_submodule(name) for name in self._dropped]):
            return forward(self.block, *args, **kwargs)

    @property
    def program(self) -> "_Program":
        """The code; that of a copy is found when it is first called."""
        if self._program is None:
            self._program = _build(self.block, self.norms, self.inline)
        return self._program

    def _traced_program(self) -> "_Program":
        _see_to_program(self._key)
        assert self._program is not None
        return self._program

    @property
    def took(self) -> dict[str, str]:
        """What each norm takes in, by the norm's name in the block; those that take in something."""
        return self.program.took

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.block).forward.__get__(self.block))

    def __getattr__(self, name: str) -> Any:
        # As a bound method would: __func__, __code__ and the like.
        if "block" not in self.__dict__:
            raise AttributeError(name)
        return getattr(type(self.block).forward.__get__(self.block), name)

    def __getstate__(self) -> dict[str, Any]:
        # Code is not copied but found again, in what the copy's modules are then.
        return {**vars(self), "_program": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._key = _known(self)


_forwards: "weakref.WeakValueDictionary[int, FusedForward]" = weakref.WeakValueDictionary()
_keys = itertools.count()


def _known(forward: FusedForward) -> int:
    """A number by which :func:`_see_to_program` finds ``forward``: an argument that Dynamo passes on."""
    key = next(_keys)
    _forwards[key] = forward
    return key


@constant_while_traced
def _see_to_program(key: int) -> bool:
    return _forwards[key].program is not None


def unfuse(module: nn.Module) -> None:
    """Give ``module`` its own code back; nothing for one that has it."""
    if isinstance(module.__dict__.get("forward"), FusedForward):
        del module.__dict__["forward"]


def takes_in(layer: type[nn.Module] | None, *, activates: bool = False) -> Takes | None:
    """What a layer of that class can take in; None for nothing.

    Args:
        layer: The class.
        activates: Whether the layer is an activation itself, so that the one that follows is dropped.
    """
    if activates:
        return Takes(sum=False, drops=True)
    if layer is not None and issubclass(layer, SyncStatistics) and layer.forward is SyncStatistics.forward:
        return Takes()
    return Takes(sum=False) if layer is GroupNorm else None


def _activates(norm: nn.Module) -> bool:
    return isinstance(norm, EvoNormB0 | EvoNormS0) or (
        isinstance(norm, FilterResponseNorm) and norm._parameters["threshold"] is not None
    )


def apply(
    norm: nn.Module, x: Tensor, residual: Tensor | None, name: str | None, negative_slope: float, written: str
) -> Tensor:
    """``act(norm(x) + residual)``, in the norm where that can be and means the same.

    Args:
        norm: Any layer.
        x: Its input.
        residual: What the original code adds, of any shape and dtype; or None.
        name: Of the activation; or None.
        negative_slope: Of a leaky ReLU.
        written: Which operand of the sum the original code writes to: ``"norm"``, ``"other"``, or neither.
    """
    activation = None if name is None else Activation(name, negative_slope)
    takes = takes_in(type(norm))
    if takes is not None and norm.activation is None and not getattr(norm, "memory_efficient", False):
        if residual is None:
            return norm(x, activation=activation)
        alike = isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (x.shape, x.dtype)
        if takes.sum and alike and residual.device == x.device:
            return norm(x, residual, activation=activation)
    y: Tensor = norm(x)
    if residual is not None:
        y = y.add_(residual) if written == "norm" else residual.add_(y) if written == "other" else y + residual
    return y if activation is None else activation(y)


class _WithoutActivation(TorchFunctionMode):
    """Within, what activates the output of a norm that is an activation itself returns that output.

    Args:
        norms: The norms.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms, self.before = norms, [norm.__dict__.get("_compiled_call_impl") for norm in norms]
        self.outputs: list[Any] = []

    def __enter__(self) -> Any:
        for norm in self.norms:  # where their calls end, hooks and all
            norm.__dict__["_compiled_call_impl"] = partial(self.call, norm._compiled_call_impl or norm._call_impl)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for norm, before in zip(self.norms, self.before, strict=True):
            norm.__dict__.pop("_compiled_call_impl")
            if before is not None:
                norm.__dict__["_compiled_call_impl"] = before

    def call(self, norm: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.outputs.append(norm(*args, **kwargs))
        return self.outputs[-1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ACTIVATIONS and any(args[0] is output for output in self.outputs):
            return args[0]
        return func(*args, **(kwargs or {}))


class _Program(NamedTuple):
    """The code by mode, and what it was made from."""

    code: dict[bool, Callable[..., Any]]
    took: dict[str, str]
    modes_agree: bool
    required: tuple[str, ...]
    defaults: dict[str, Any]
    modules: tuple[nn.Module, ...]
    hooks: tuple[dict[Any, Any], ...]
    attributes: tuple[tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...]], ...]
    children: tuple[tuple[dict[str, Any], dict[str, Any]], ...]

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """What the code is called with: every required argument a tensor, every other left at its default; else None."""
        given = [*args, *(kwargs[name] for name in self.required[len(args) :] if name in kwargs)]
        others = [name for name in kwargs if name not in self.required[len(args) :]]
        usual = all(name in self.defaults and kwargs[name] is self.defaults[name] for name in others)
        fits = (
            usual and len(given) == len(self.required) and all(isinstance(value, (Tensor, fx.Proxy)) for value in given)
        )
        return given if fits else None

    def holds(self, dropped: Sequence[str] = ()) -> bool:
        """Whether the modules are as they were when the code was made, and that of a copy without what was dropped."""
        training = self.modules[0].training
        return all(name in self.took for name in dropped) and not (
            any(self.hooks)
            or _globals._global_forward_hooks
            or _globals._global_forward_pre_hooks
            or _globals._global_backward_hooks
            or _globals._global_backward_pre_hooks
            or any(tuple(map(own.get, names)) != values for own, names, values in self.attributes)
            or any(now != then for now, then in self.children)
            or (not self.modes_agree and any(module.training is not training for module in self.modules))
        )


def _build(block: nn.Module, norms: tuple[str, ...], inline: tuple[str, ...]) -> _Program:
    code: dict[bool, Callable[..., Any]] = {}
    took: dict[str, str] = {}
    inlined = [block.get_submodule(name) for name in inline]
    layers = {name: block.get_submodule(name) for name in norms}
    takes = {name: takes_in(type(norm), activates=_activates(norm)) for name, norm in layers.items()}
    silent: list[nn.Module] = []
    sources: set[str] = set()
    try:
        for mode, graph in graphs_of(block, inlined).items():
            made = fuse_graph(block, graph, {name: each for name, each in takes.items() if each is not None}, apply)
            silent += [block.get_submodule(name) for fusion in made for name in fusion.modules]
            took |= {fusion.norm: fusion.took for fusion in made if fusion.took}
            made_module = fx.GraphModule(block, graph)
            code[mode] = type(made_module).forward
            sources.add(made_module.code)
        required = required_arguments(block)
    except UntraceableError:  # a copy whose code has changed since
        code, required = dict.fromkeys((True, False), type(block).forward), required_arguments(block)
        took.clear()
    own = (block, *inlined)
    changed = [
        norm for name, norm in layers.items() if not (name in took and _activates(norm))
    ]  # called in another way
    parameters = inspect.signature(type(block).forward).parameters
    return _Program(
        code=code,
        took=took,
        modes_agree=len(sources) == 1,
        required=required,
        defaults={name: p.default for name, p in parameters.items() if p.default is not p.empty},
        modules=own,
        hooks=tuple(hooks for module in (*inlined, *changed, *silent) for hooks in hook_dicts(module)),
        attributes=(
            *(_attributes(module) for module in (*own, *silent)),
            *((vars(m), ("forward",), (vars(m).get("forward"),)) for m in (*inlined, *layers.values(), *silent)),
        ),
        children=tuple((module._modules, dict(module._modules)) for module in own),
    )


def _attributes(module: nn.Module) -> tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...]]:
    names = tuple(name for name, value in vars(module).items() if type(value) in _PLAIN and name != "training")
    return vars(module), names, tuple(vars(module)[name] for name in names)
