"""What follows the norms in a graph, and the graph with it inside them.

A norm takes in a sum and an activation where they are the only use of its output. Its call keeps its place among the calls
of other norms, so that a rank which runs the original code for some reason meets the others in the same order.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from syncnorm.conversion._trace import hook_dicts
from syncnorm.core.activation import Activation

__all__ = ["ACTIVATIONS", "Fusion", "Takes", "fuse_graph"]

_FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu", torch.relu: "relu", torch.relu_: "relu", functional.relu_: "relu", "relu": "relu",
    "relu_": "relu", functional.leaky_relu: "leaky_relu", functional.leaky_relu_: "leaky_relu", functional.silu: "silu",
    functional.gelu: "gelu",
}  # fmt: skip
ACTIVATIONS = {getattr(function, "__name__", function) for function in _FUNCTIONS}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MAKES_ITS_OUTPUT = (nn.modules.conv._ConvNd, nn.Linear)


class Takes(NamedTuple):
    """What a norm can take in."""

    activation: bool = True
    sum: bool = True
    drops: bool = False  # the activation, as it is one itself


class Fusion(NamedTuple):
    """What became of one call of a norm.

    Attributes:
        norm: Its name below the root of the graph.
        took: In words, what it took in; empty for nothing.
        why: Why nothing, in words.
        escapes: Its output is an output of the graph, so that what follows it is elsewhere.
        modules: Names of modules that are called no more.
        follower: Name of the module that follows and is none that a norm can take in.
    """

    norm: str
    took: str = ""
    why: str = ""
    escapes: bool = False
    modules: tuple[str, ...] = ()
    follower: str = ""


class _RefusedError(Exception):
    """Why a norm cannot take in what follows it; and the name of the module that does, if that is why."""


def fuse_graph(root: nn.Module, graph: fx.Graph, takes: dict[str, Takes], apply: Callable[..., Tensor]) -> list[Fusion]:
    """Let norms take in what follows them, in place.

    Args:
        root: What the graph is of.
        graph: From :func:`graphs_of`; changed.
        takes: By name, the norms and what they can take in.
        apply: What is called in their place: ``apply(norm, x, residual, activation, negative_slope, written)``.

    Returns:
        One entry per call of a norm, in order.
    """
    return _Matcher(root, graph, takes, apply).run()


class _Matcher:
    def __init__(self, root: nn.Module, graph: fx.Graph, takes: dict[str, Takes], apply: Callable[..., Tensor]) -> None:
        self.root, self.graph, self.takes, self.apply = root, graph, takes, apply

    def run(self) -> list[Fusion]:
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target in self.takes]
        return [self.fuse(call) for call in calls]

    def fuse(self, call: fx.Node) -> Fusion:
        name = str(call.target)
        try:
            taken, residual, written, activation = self.followers(call)
            modules = tuple(str(node.target) for node in taken if node.op == "call_module")
            if any(hook_dicts(self.root.get_submodule(name))) and not self.takes[name].drops:
                raise _RefusedError("it has hooks, which would see another output")
            hooked = [module for module in modules if any(hook_dicts(self.root.get_submodule(module)))]
            if hooked:
                raise _RefusedError(f"{hooked[0]} has hooks, which would not be called")
        except _RefusedError as why:
            return Fusion(name, why=str(why.args[0]), follower=(*why.args, "")[1])
        if not taken:
            return Fusion(name, why="its output leaves {}", escapes=True)
        new = call
        if not self.takes[name].drops:
            total = next((node for node in taken if residual in node.args), call)
            later = residual is not None and self.order()[residual] > self.order()[call]
            with self.graph.inserting_before(total if later else call):
                norm = self.graph.get_attr(name)
                function = activation or (None, 0.0)
                new = self.graph.call_function(self.apply, (norm, call.args[0], residual, *function, written))
        taken[-1].replace_all_uses_with(new)
        for node in reversed(taken if new is call else [call, *taken]):
            self.graph.erase_node(node)
        words = ["the sum"] * (residual is not None) + ([activation.name] if activation else [])
        return Fusion(name, took=" and ".join(words), modules=modules)

    def followers(self, call: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str, Activation | None]:
        """Nodes to take in (none if the output escapes), the tensor to add, what the sum writes to, the activation."""
        takes = self.takes[str(call.target)]
        if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], fx.Node):
            raise _RefusedError("it is called with more than its input")
        end, passed = self.through_identities(call)
        user = self.only_user(end)
        if user.op == "output":
            return [], None, "", None
        activation = self.activation(user)
        if activation is not None and takes.activation:
            return [*passed, user], None, "", activation
        if not (takes.sum and _is_sum(user)):
            raise _RefusedError(
                f"what follows is {self.described(user)}", str(user.target) if user.op == "call_module" else ""
            )
        residual, written = self.other_operand(user, call, end)
        taken = [*passed, user]
        end, more = self.through_identities(user)
        if len(end.users) == 1 and (activation := self.activation(next(iter(end.users)))) is not None:
            taken += [*more, next(iter(end.users))]
        return taken, residual, written, activation

    def other_operand(self, total: fx.Node, call: fx.Node, end: fx.Node) -> tuple[fx.Node, str]:
        """What is added to the output of a norm, and which of the two operands is written to: norm, other or neither."""
        left, right = total.args
        other = right if left is end else left
        if not isinstance(other, fx.Node) or other is end:
            raise _RefusedError("what is added to its output is not another tensor")
        written = "" if total.target in (operator.add, torch.add, "add") else "norm" if left is end else "other"
        if written == "other" and not self.is_its_own(other, total):
            raise _RefusedError("the sum is written into a tensor that others may hold")
        order = self.order()
        between = [node for node in order if order[call] < order[node] < order[total]]
        writing = [node for node in between if self.may_write(node)]
        if order[other] < order[call]:
            hindrance = [] if self.is_its_own(other, total) else writing
        else:  # the norm has to wait for it
            hindrance = [node for node in between if self.may_meet_ranks(node)]
            hindrance += [] if self.is_its_own(call.args[0], call) else writing
        if hindrance:
            raise _RefusedError(f"{self.described(hindrance[0])} comes between it and the sum")
        return other, written

    def order(self) -> dict[Any, int]:
        return {node: place for place, node in enumerate(self.graph.nodes)}

    def only_user(self, node: fx.Node) -> fx.Node:
        if len(node.users) != 1:
            raise _RefusedError(
                f"its output is used {len(node.users)} times" if node.users else "its output is not used"
            )
        return next(iter(node.users))

    def through_identities(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        passed: list[fx.Node] = []
        while len(node.users) == 1 and type(self.module(next(iter(node.users)))) is nn.Identity:
            node = next(iter(node.users))
            passed.append(node)
        return node, passed

    def is_its_own(self, node: Any, user: fx.Node) -> bool:
        """Whether ``node`` is a tensor that its module has made, and that only ``user`` has seen."""
        while isinstance(node, fx.Node) and list(node.users) == [user]:
            module = self.module(node)
            if node.target is self.apply or node.target in self.takes or isinstance(module, _MAKES_ITS_OUTPUT):
                return module is None or not any(hook_dicts(module))
            if type(module) is not nn.Identity:
                return False
            node, user = node.args[0], node
        return False

    def may_write(self, node: fx.Node) -> bool:
        """Whether the call may change a tensor that it is given."""
        if node.op == "call_method":
            return str(node.target).endswith("_")
        if node.op == "call_function":
            name, arguments = getattr(node.target, "__name__", "_"), (*node.args, *node.kwargs.values())
            in_place = name.endswith("_") or (getattr(operator, name, None) is node.target and name in _WRITING)
            return in_place or "out" in node.kwargs or any(value is True for value in arguments)
        return node.op == "call_module" and (
            self.may_meet_ranks(node) or bool(getattr(self.module(node), "inplace", False))
        )

    def may_meet_ranks(self, node: fx.Node) -> bool:
        """Whether the call is of anything but a plain layer or operation of torch, and may do whatever it likes."""
        if node.op == "call_function":
            where = str(getattr(node.target, "__module__", ""))
            return not where.startswith(("torch", "_operator", "math")) or where.startswith("torch.distributed")
        module = self.module(node)
        if module is None:
            return False
        plain = type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())
        return not plain or isinstance(module, nn.modules.batchnorm._NormBase) or any(hook_dicts(module))

    def activation(self, node: fx.Node) -> Activation | None:
        module, options = self.module(node), dict(node.kwargs)
        if module is not None:
            if len(node.args) > 1 or options:
                return None
            if type(module) is nn.GELU:
                return Activation("gelu") if module.approximate == "none" else None
            if type(module) is nn.LeakyReLU:
                return Activation("leaky_relu", module.negative_slope)
            return (
                Activation("relu")
                if type(module) is nn.ReLU
                else Activation("silu")
                if type(module) is nn.SiLU
                else None
            )
        name = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
        options.pop("inplace", None)
        if name == "leaky_relu":
            slope = options.pop("negative_slope", (*node.args, 0.01)[1])
            return Activation(name, slope) if not options and isinstance(slope, float | int) else None
        if name == "gelu" and options.pop("approximate", "none") != "none":
            return None
        return Activation(name) if name and not options else None

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def described(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return f"{type(module).__name__} ({node.target})"
        return str(getattr(node.target, "__name__", node.target))


_WRITING = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "setitem",
)


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method") and node.target in _SUMS and len(node.args) == 2 and not node.kwargs
    )
