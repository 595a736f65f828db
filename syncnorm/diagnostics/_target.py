"""What a command line names: ``pkg.mod:factory``, and what that makes."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from syncnorm.diagnostics._findings import Subject

__all__ = ["load_subject"]


def load_subject(target: str, shape: Sequence[int] = (), ranks: int | None = None) -> Subject:
    """Import what ``target`` names and call it.

    Args:
        target: ``"pkg.mod:factory"``. The factory is a module, a class or a function without arguments; it is or gives a model,
            or a tuple of a model and, in any order, an input of it and a Lightning Trainer.
        shape: Of a random input, in place of the factory's.
        ranks: How many ranks will run the model; by default what the Trainer says.

    Raises:
        ValueError: With one line that says what to do, if there is no such thing, it fails, or it makes no model.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"expected pkg.mod:factory, got {target!r}. For example my_project.models:build.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may exit
        raise ValueError(
            f"cannot import {module_name!r}: {_short(error)}. Run from the folder that holds it, or set PYTHONPATH."
        ) from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            close = difflib.get_close_matches(part, [name for name in dir(factory) if name[0] != "_"], n=3)
            raise ValueError(f"{module_name} has no {attribute!r}.{f' Close names are {close}.' if close else ''}")
        factory = getattr(factory, part)
    try:
        made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except (Exception, SystemExit) as error:
        raise ValueError(f"{target} was called without arguments and raised {_short(error)}.") from error
    parts = list(made) if isinstance(made, tuple) else [made]
    models = [part for part in parts if isinstance(part, nn.Module)]
    trainers = [part for part in parts if hasattr(part, "callbacks") and hasattr(part, "strategy")]
    known = {id(part) for part in (*models, *trainers)}
    others = [part for part in parts if id(part) not in known]  # not by ==, which of an array is an array
    if len(models) != 1 or len(trainers) > 1 or len(others) > 1:
        raise ValueError(
            f"{target} must make an nn.Module, or a tuple of one, an input and a Trainer; it made {_kinds(parts)}."
        )
    trainer = trainers[0] if trainers else None
    if shape:
        others = [torch.randn(*shape)]
    return Subject(models[0], others[0] if others else None, trainer, ranks or getattr(trainer, "world_size", None))


def _kinds(parts: list[Any]) -> str:
    return "(" + ", ".join(type(part).__name__ for part in parts) + ")" if len(parts) != 1 else type(parts[0]).__name__


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
