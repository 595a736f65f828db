"""Everything in this folder needs a CUDA device, and says so where there is none."""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device here"))
