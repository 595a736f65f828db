"""Arithmetic that stays in the dtype it was given, whatever autocast says of matrix products and convolutions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from syncnorm.core.traced import constant_while_traced

__all__ = ["without_autocast"]


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Within, autocast leaves operations on the device of ``x`` alone."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@constant_while_traced  # Dynamo of torch 2.11 cannot look into it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
