"""Which norms of a model can take in the activation and the sum that follow them, and in whose code that is seen.

From the inside out: first every module's own code, with calls of other modules as they are; where the output of a norm
leaves its module, the code around that, with the module's code in it.
"""

from contextlib import suppress
from typing import NamedTuple

from torch import nn

from syncnorm.conversion._fused_forward import FusedForward, apply
from syncnorm.conversion._layers import display
from syncnorm.conversion._match import Fusion, Takes, fuse_graph
from syncnorm.conversion._trace import UntraceableError, graphs_of, hook_dicts

__all__ = ["Block", "Fusions", "find_fusions"]


class Block(NamedTuple):
    """A module whose code is to be replaced; names are below it."""

    module: nn.Module
    norms: tuple[str, ...]
    inline: tuple[str, ...]

    def install(self) -> None:
        """Let the norms take in what they can, from now on."""
        self.module.__dict__["forward"] = FusedForward(*self)


class Fusions(NamedTuple):
    """What was found.

    Attributes:
        blocks: Whose code changes.
        took: By ``id`` of a norm, what it takes in, in words.
        why: By ``id`` of a norm, why it takes in nothing, in words.
    """

    blocks: list[Block]
    took: dict[int, str]
    why: dict[int, str]


def find_fusions(model: nn.Module, takes: dict[int, Takes]) -> Fusions:
    """Look through all code of ``model`` that torch.fx can follow. Changes nothing.

    Args:
        model: Any module.
        takes: By ``id``, the norms and what they can take in.
    """
    found = Fusions([], {}, dict.fromkeys(takes, "no code that calls it was found"))
    pending = set(takes)
    for name, block in reversed([*model.named_modules()]):  # children first
        norms = {below: takes[id(norm)] for below, norm in block.named_modules() if below and id(norm) in takes}
        waiting = [below for below in norms if id(block.get_submodule(below)) in pending]
        if not waiting or type(block).forward is nn.Module.forward:
            continue
        inline = _between(block, waiting)
        try:
            fusions = _fusions(block, norms, inline)
            with suppress(UntraceableError):
                if simple := _simple(block, fusions):  # somebody's own activation, say
                    inline, fusions = (*inline, *simple), _fusions(block, norms, (*inline, *simple))
        except UntraceableError as error:
            for below in waiting:
                norm = id(block.get_submodule(below))
                pending.discard(norm)
                found.why[norm] = f"{type(block).__name__} ({display(name)}) cannot be followed: {error}"
            continue
        for fusion in fusions:
            norm = id(block.get_submodule(fusion.norm))
            if fusion.took:
                found.took[norm] = fusion.took
            elif norm in pending:
                found.why[norm] = fusion.why.format(display(name))
            if not fusion.escapes:
                pending.discard(norm)
        if any(fusion.took and fusion.norm in waiting for fusion in fusions):
            found.blocks.append(Block(block, tuple(norms), inline))
    return found


def _fusions(block: nn.Module, norms: dict[str, Takes], inline: tuple[str, ...]) -> list[Fusion]:
    if "forward" in block.__dict__ and not isinstance(block.__dict__["forward"], FusedForward):
        raise UntraceableError("its forward was replaced on the object")
    graphs = graphs_of(block, [block.get_submodule(name) for name in inline])
    # In evaluation first: of a norm that can take in something in training, that is what is told.
    return [fusion for mode in (False, True) for fusion in fuse_graph(block, graphs[mode], norms, apply)]


def _between(block: nn.Module, norms: list[str]) -> tuple[str, ...]:
    """Names of the modules between ``block`` and its norms whose code can be part of its own."""
    parts = [name.split(".") for name in norms]
    names = {".".join(path[:length]) for path in parts for length in range(1, len(path))}
    return tuple(sorted(name for name in names if _is_open(block.get_submodule(name))))


def _simple(block: nn.Module, fusions: list[Fusion]) -> tuple[str, ...]:
    """Modules behind norms that are nothing but a function, and not torch's."""
    followers = {fusion.follower: block.get_submodule(fusion.follower) for fusion in fusions if fusion.follower}
    return tuple(
        name
        for name, module in followers.items()
        if not (
            module._modules or module._parameters or module._buffers or type(module).__module__.startswith("torch.")
        )
        and _is_open(module)
    )


def _is_open(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    return (
        type(module).__call__ is nn.Module.__call__
        and (own is None or isinstance(own, FusedForward))
        and module.__dict__.get("_compiled_call_impl") is None
        and not any(hook_dicts(module))
    )
