"""Rows as aligned text, and reports that are made of lines and tables."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Report", "Table", "table"]


class Table(NamedTuple):
    """Columns under a header; prints left-aligned, two spaces apart, and as nothing where there are no rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        if not self.rows:
            return ""
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.header, *self.rows)
        )
        return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart; empty for no rows."""
    return str(Table(header, rows))


class Report:
    """What a look at something found; true if all is well. A terminal may draw its parts, everything else prints them."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found that is to be mended."""
        return True

    def parts(self) -> Iterable[str | Table]:
        """Lines of text and tables, in order."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts())
