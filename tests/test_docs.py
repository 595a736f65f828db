"""Tier: no process. The pages build without a warning, and every public name has its place in them."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "modules", "functional", "conversion", "calibration", "diagnostics", "lightning", "distributed", "testing", "kernels",
    "errors",
)  # fmt: skip
DATA = {"To", "BACKENDS", "MODE"}  # names without a docstring


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs: pip install syncnorm[docs]")
    pytest.importorskip("material", reason="needs the extra docs: pip install syncnorm[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "configs/mkdocs.yml", "-d", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    shown = {
        name
        for page in (tmp_path / "api").glob("*.html")
        for name in re.findall(r'id="(syncnorm[\w.]+)"', page.read_text())
    }
    for package in PACKAGES:
        public = {*importlib.import_module(f"syncnorm.{package}").__all__} - DATA
        # A function in a module of its own name is hidden by that in the list of its package.
        missing = {n for n in public if not {f"syncnorm.{package}.{n}", f"syncnorm.{package}.{n}.{n}"} & shown}
        assert not missing, f"{package}: {missing}"
    # A docstring that was not parsed keeps its sections as text, run together.
    raw = [page.name for page in (tmp_path / "api").glob("*.html") if "<p>Args:" in page.read_text()]
    assert not raw
    text = (tmp_path / "command_line.html").read_text()
    missing = [word for word in ("convert_ckpt", "advise", "num_batches") if word not in text]
    assert not missing
