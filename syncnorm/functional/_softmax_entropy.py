"""Entropy of the distribution that logits stand for."""

import torch
from torch import Tensor

__all__ = ["softmax_entropy"]


def softmax_entropy(logits: Tensor, dim: int = 1) -> Tensor:
    """Compute ``-Σ p·log p`` with p the softmax of ``logits`` over ``dim``, in at least float32.

    A class of logit -inf has probability 0 and adds nothing, to the entropy and to its gradient.

    Args:
        logits: ``[N, K, *]``, floating point.
        dim: The dim of the classes.

    Returns:
        Tensor of the shape of ``logits`` without ``dim``; between 0 and log K.

    Raises:
        TypeError: If ``logits`` are not floating point.
    """
    if not logits.is_floating_point():
        raise TypeError(f"softmax_entropy: expected floating-point logits, got {logits.dtype}.")
    log_p = torch.log_softmax(logits, dim, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(dim)
