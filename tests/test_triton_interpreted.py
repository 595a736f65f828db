"""Tier: no process. The triton kernels' arithmetic without a GPU: triton interprets them on CPU, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from syncnorm.kernels.triton import _interpreter_objection

pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")

RANKS = ["tests/gpu/test_ranks.py::test_ranks_that_share_a_device_over_gloo"]  # which need no device to be told apart


@pytest.mark.slow
@pytest.mark.skipif(bool(_interpreter_objection()), reason=str(_interpreter_objection()))
@pytest.mark.timeout(300)
def test_every_case_holds_under_the_interpreter() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--timeout", "240"]
    command += ["tests/triton_cases.py", *RANKS]
    outcome = subprocess.run(
        command, cwd=here.parent, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
    assert " passed" in outcome.stdout and "skipped" not in outcome.stdout
