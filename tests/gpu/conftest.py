"""Everything in this folder needs a CUDA device, and says so where there is none."""

from pathlib import Path

import pytest
import torch

from tests.triton_cases import INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device here"))
