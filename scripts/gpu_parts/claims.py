"""Runs the tests that need a device, by pytest where it is installed and by a small stand-in elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

# Our own settings ask for plugins that need not be here.
_INI = "[pytest]\nmarkers =\n    gpu: x\n    gloo: x\n    slow: x\n    timeout: x\n"
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
_TEST = re.compile(r"tests/\S+\.py::.+?(?= PASSED| FAILED| ERROR| SKIPPED| \[|$)")


def run(files: list[str], out: Path, dry: bool, workers: int) -> Iterator[dict[str, Any]]:
    """One row for every outcome as it comes, so that whoever is cut off has those that came."""
    ini = out / "pytest.ini"
    ini.write_text(_INI)
    if importlib.util.find_spec("pytest"):
        command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        command += ["--tb=short", "--color=no", "-q" if dry else "-v"]
        if importlib.util.find_spec("xdist") and not dry and workers > 1:  # compiling kernels is what takes long
            command += ["-n", str(min(workers, os.cpu_count() or 1))]
    else:
        command = [sys.executable, str(Path(__file__).with_name("tiny_pytest.py"))]
    command += ["--collect-only"] if dry else []
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("PYTEST_ADDOPTS", None)  # what it prints is read here
    process = subprocess.Popen(
        [*command, *files], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        test, outcome = _TEST.search(line), _OUTCOME.search(line)
        if test and outcome and not line.startswith(("FAILED", "ERROR")):
            yield {"test": test[0].strip(), "outcome": outcome[1].lower()}
        elif dry and test:
            yield {"test": test[0], "outcome": "collected"}
    code = process.wait()
    if code not in (0, 1):
        raise SystemExit(f"the tests ended with code {code}")
