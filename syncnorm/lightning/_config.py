"""Configuration files are read with suspicion: bounded in size and depth, no aliases, no key twice.

YAML's aliases let 442 bytes stand for billions of values, and of two equal keys the last wins without a word. What passes
is then loaded by jsonargparse's own safe loader, which makes no objects and takes ``1e-5`` for the number it is.
"""

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

__all__ = ["MODE", "load_config"]

MODE = "syncnorm"
"""Name of this loader among jsonargparse's parser modes."""

_LARGEST = 64 * 1024  # bytes; the largest of configs/ has 1 kB
_DEEPEST = 16


def load_config(text: str) -> Any:
    """Load a configuration, or a single value from a command line.

    Args:
        text: YAML or JSON.

    Raises:
        yaml.YAMLError: If it is malformed, too large or too deep, or has an alias, a tag of an object, or a key twice.
    """
    if len(text.encode(errors="replace")) > _LARGEST:
        raise yaml.YAMLError(f"a configuration may have {_LARGEST // 1024} KiB at most, this one is larger. Split it.")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {where}: aliases (*{event.anchor}) are not allowed. Write the values out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"line {where}: nested more than {_DEEPEST} deep.")
    _refuse_doubles(yaml.compose(text, Loader=yaml.SafeLoader))
    return get_loader("yaml")(text)


def _refuse_doubles(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise yaml.YAMLError(f"line {line}: the key {name!r} is there twice, first in line {lines[name]}.")
            lines[name] = line
            _refuse_doubles(value)


set_loader(MODE, load_config, exceptions=(yaml.YAMLError,))
