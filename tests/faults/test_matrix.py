"""Tier: no process. The fault matrix of README.md names tests that exist, and no row is without one."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TEXT = (Path(__file__).parent / "README.md").read_text()
RUN, _, NOT_RUN = TEXT.partition("## What cannot be asserted here")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "what happens" and not row[0].startswith("---")]


def test_at_least_forty_rows_run() -> None:
    found = rows(RUN)
    assert len(found) >= 40 and len({row[0] for row in found}) == len(found)
    assert all(len(row) == 3 and "::" in row[2] for row in found)
    assert all(len(row) == 2 and all(row) for row in rows(NOT_RUN))


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`([\w/]+\.py(?:::[^`]+)?)`", TEXT)) - {"test_matrix.py"}))
def test_every_id_exists(test: str) -> None:
    path, _, rest = test.partition("::")
    if path.startswith("scripts/"):
        assert (TESTS.parent / path).exists()
        return
    source = (TESTS / path).read_text()
    name, _, case = rest.partition("[")
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions, f"{path} has no test {name}"
    assert not case or f'"{case.rstrip("]")}"' in source, f"{path} has no case {case}"
