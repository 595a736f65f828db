"""Differentiable public functions: core mathematics, a kernel backend and the meeting of ranks, joined."""

from syncnorm.functional._sync_batch_norm import sync_batch_norm

__all__ = ["sync_batch_norm"]
