"""The command line: ``python -m syncnorm COMMAND``.

A command is a function: its signature is the command line, its docstring the help, its report the output. What all
commands share is here and in ``_arguments`` and ``_console``: ``--json``, one line for bad input, the exit status.
"""

from syncnorm.cli._main import main

__all__ = ["main"]
