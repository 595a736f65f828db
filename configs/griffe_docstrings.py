"""Docstrings as pages of Markdown have them: what Sphinx calls :func:`syncnorm.convert` as code, an example as one.

A class whose docstring is put together, as those of one layer in three dims, is asked for it.
"""

import importlib
import inspect
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?\.?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if not obj.docstring and obj.is_class and "__doc__" in obj.members:
            made = getattr(importlib.import_module(obj.module.path), obj.name)
            obj.docstring = griffe.Docstring(inspect.cleandoc(made.__doc__), parent=obj, parser=griffe.Parser.google)
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            # griffe knows the plural
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
