"""Tier: gloo ranks. The notebook runs from top to bottom: its own assertions hold, and it prints what it talks of.

Its cells are executed in order in one namespace called ``__main__``, without a file, as a kernel does; a kernel itself would
take as long to start as all of them together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "examples/tour.ipynb"
SECONDS = 300
RUN = """
import json, sys
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"))
"""


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_plain_and_small() -> None:
    """No magics, which the test could not run; outputs, where there are any, are a few lines of text."""
    assert not any(line.startswith(("%", "!")) for cell in cells("code") for line in cell.splitlines())
    assert TOUR.stat().st_size < 40_000 and "image/png" not in TOUR.read_text()
    for link in ("choosing", "conversion", "faults"):
        assert f"(../docs/{link}.md)" in cells("markdown")[-1] and (ROOT / f"docs/{link}.md").exists()


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 10)
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(TOUR)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "local BatchNorm: test error", "afterwards: BatchNorm1d(", "to group_norm: 3 replace",
        "2 ranks of [6, 4] samples equal one process of 10", "batches of 200: {'leave'}", "recalibrated:",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())
