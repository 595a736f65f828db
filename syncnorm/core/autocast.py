"""Arithmetic that stays in the dtype it was given, whatever autocast says of matrix products and convolutions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["without_autocast"]


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Within, autocast leaves operations on the device of ``x`` alone."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
