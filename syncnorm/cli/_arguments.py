"""A function becomes a command: parameters are its arguments, keyword-only ones its options, the docstring its help."""

import argparse
import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

__all__ = ["Count", "Equals", "Folder", "Globs", "Shape", "Target", "add_command"]


@dataclass(frozen=True)
class _Kind:
    """How text becomes a value, and what stands for it in the help."""

    parse: Callable[[str], Any]
    metavar: str
    repeated: bool = False


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be sizes with commas between them, such as 8,3,224,224; got {text!r}")
    return tuple(int(size) for size in text.split(","))


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME", Path: "FILE"}
_FEW = 6  # choices that fit into a usage line

Count: TypeAlias = Annotated[int, _Kind(_count, "N")]
Folder: TypeAlias = Annotated[Path, _Kind(Path, "FOLDER")]
Shape: TypeAlias = Annotated[tuple[int, ...], _Kind(_shape, "N,C,...")]
Target: TypeAlias = Annotated[str, _Kind(str, "pkg.mod:factory")]
Globs: TypeAlias = Annotated[tuple[str, ...], _Kind(str, "GLOB", repeated=True)]
Equals: TypeAlias = Annotated[tuple[str, ...], _Kind(str, "COLUMN=VALUE", repeated=True)]


def add_command(commands: Any, function: Callable[..., Any]) -> None:
    """Add the parser of a command to ``commands``, what ``add_subparsers`` gave.

    Args:
        commands: Where to.
        function: Takes what the command line gives, and returns a report. Its docstring is in Google style, and tells of
            every parameter.
    """
    summary, description, helps = _docstring(function)
    parser = commands.add_parser(
        function.__name__.replace("_", "-"),
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=f"{summary}\n\n{description}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        _add_argument(parser, parameter, hints[name], helps[name])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=function)


def _add_argument(parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    given: dict[str, Any] = {"help": text.replace("%", "%%")}
    positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    optional = parameter.default is not inspect.Parameter.empty
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        hint = (
            Literal[tuple(name for member in members for name in get_args(member))] if len(members) > 1 else members[0]
        )
    kind = get_args(hint)[1] if get_origin(hint) is Annotated else None
    if hint is bool:
        given["action"] = "store_true"
    elif get_origin(hint) is Literal:
        given["choices"] = choices = get_args(hint)
        if len(choices) > _FEW:
            given["metavar"] = "NAME"
            given["help"] += f": {', '.join(choices)}"
    else:
        metavar = parameter.name.upper() if positional else _METAVARS.get(hint, "")
        given["type"], given["metavar"] = (hint, metavar) if kind is None else (kind.parse, kind.metavar)
    if kind and kind.repeated:
        given["action"] = "append"
        given["help"] += "; may be repeated"
    if optional and hint is not bool:
        given["default"] = None if kind and kind.repeated else parameter.default
        if isinstance(parameter.default, str | int | float | Path):
            given["help"] += f" (default: {parameter.default})"
    if positional:
        if optional:
            given["nargs"] = "?"
        parser.add_argument(parameter.name, **given)
    else:
        parser.add_argument(f"--{parameter.name.replace('_', '-')}", required=not optional, **given)


def _docstring(function: Callable[..., Any]) -> tuple[str, str, dict[str, str]]:
    """The first line, what stands between it and ``Args:``, and what is said of each parameter."""
    text = inspect.getdoc(function) or ""
    body, _, tail = text.partition("\nArgs:\n")
    summary, _, description = body.strip().partition("\n")
    arguments = re.split(r"\n\n|\n(?=\S)", tail)[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE)
    helps = {name: " ".join(said.split()).rstrip(".") for name, said in found}
    return summary, description.strip().replace("``", ""), {k: v[0].lower() + v[1:] for k, v in helps.items()}
