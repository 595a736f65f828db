"""A guard against a compiler that computes a backward from buffers after their update."""

import torch
from torch import Tensor

__all__ = ["not_recomputed"]


def not_recomputed(value: Tensor) -> Tensor:
    """``value``; inside ``torch.compile`` in a form that the backward graph keeps instead of computing it again.

    AOTAutograd (torch 2.13) forms again in the backward what was cheap in the forward, also from buffers that the forward
    has moved in place since: in ``y = x·(2·buf); buf.add_(1)`` the gradient is 2·(buf + 1). It never does so with a
    reduction.
    """
    if not torch.compiler.is_compiling():
        return value
    return torch.stack([value, torch.zeros_like(value)]).sum(0)
