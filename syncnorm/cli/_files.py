"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic", "refuse_existing"]


def refuse_existing(path: Path, force: bool) -> None:
    """Before any work is done, see that ``path`` can be written.

    Raises:
        ValueError: If something is there and ``force`` is not given, or there is no folder for it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it.")
    if path.exists() and not force:
        raise ValueError(f"{path} is there already: choose another name, or say --force.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}: make it first.")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` at the end, and goes away after an error."""
    path = path.resolve()  # through a link, not over it
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
