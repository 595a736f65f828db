"""A module's own code with its norms taking in what follows them: on the object, under ``forward``, as long as it holds.

Nothing else of the model changes. Where the code may no longer be the same, because hooks were added or an attribute was
changed since, the original code runs.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _globals

from syncnorm.conversion._match import Takes, fuse_graph
from syncnorm.conversion._trace import UntraceableError, graphs_of, hook_dicts, required_arguments
from syncnorm.core.activation import Activation
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
        self._program: _Program | None = _build(block, self.norms, self.inline)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler fuses for itself, and sees through the original code.
        if not torch.compiler.is_compiling():
            if self._program is None:  # of a copy
                self._program = _build(self.block, self.norms, self.inline)
            given = self._program.arguments(args, kwargs)
            if given is not None and self._program.holds():
                return self._program.code[self.block.training](self.block, *given)
        return type(self.block).forward(self.block, *args, **kwargs)

    @property
    def took(self) -> dict[str, str]:
        """What each norm takes in, by the norm's name in the block; those that take in something."""
        if self._program is None:
            self._program = _build(self.block, self.norms, self.inline)
        return self._program.took

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


class _Program(NamedTuple):
    """The code by mode, and what it was made from."""

    code: dict[bool, Callable[..., Any]]
    took: dict[str, str]
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
        fits = usual and len(given) == len(self.required) and all(isinstance(value, Tensor) for value in given)
        return given if fits else None

    def holds(self) -> bool:
        """Whether the modules are as they were when the code was made."""
        training = self.modules[0].training
        return not (
            any(self.hooks)
            or _globals._global_forward_hooks
            or _globals._global_forward_pre_hooks
            or _globals._global_backward_hooks
            or _globals._global_backward_pre_hooks
            or any(tuple(map(own.get, names)) != values for own, names, values in self.attributes)
            or any(now != then for now, then in self.children)
            or any(module.training is not training for module in self.modules)
        )


def _build(block: nn.Module, norms: tuple[str, ...], inline: tuple[str, ...]) -> _Program:
    code: dict[bool, Callable[..., Any]] = {}
    took: dict[str, str] = {}
    inlined = [block.get_submodule(name) for name in inline]
    layers = {name: block.get_submodule(name) for name in norms}
    takes = {name: takes_in(type(norm), activates=_activates(norm)) for name, norm in layers.items()}
    silent: list[nn.Module] = []
    try:
        for mode, graph in graphs_of(block, inlined).items():
            made = fuse_graph(block, graph, {name: each for name, each in takes.items() if each is not None}, apply)
            silent += [block.get_submodule(name) for fusion in made for name in fusion.modules]
            took |= {fusion.norm: fusion.took for fusion in made if fusion.took}
            code[mode] = type(fx.GraphModule(block, graph)).forward
        required = required_arguments(block)
    except UntraceableError:  # a copy whose code has changed since
        code, required = dict.fromkeys((True, False), type(block).forward), required_arguments(block)
        took.clear()
    own = (block, *inlined)
    parameters = inspect.signature(type(block).forward).parameters
    return _Program(
        code=code,
        took=took,
        required=required,
        defaults={name: p.default for name, p in parameters.items() if p.default is not p.empty},
        modules=own,
        hooks=tuple(hooks for module in (*inlined, *layers.values(), *silent) for hooks in hook_dicts(module)),
        attributes=(
            *(_attributes(module) for module in (*own, *silent)),
            *((vars(m), ("forward",), (vars(m).get("forward"),)) for m in (*inlined, *layers.values(), *silent)),
        ),
        children=tuple((module._modules, dict(module._modules)) for module in own),
    )


def _attributes(module: nn.Module) -> tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...]]:
    names = tuple(name for name, value in vars(module).items() if type(value) in _PLAIN and name != "training")
    return vars(module), names, tuple(vars(module)[name] for name in names)
