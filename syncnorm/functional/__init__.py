"""Differentiable public functions: core mathematics, a kernel backend and the meeting of ranks, joined."""

from syncnorm.functional._batch_renorm import batch_renorm
from syncnorm.functional._sync_batch_norm import sync_batch_norm

__all__ = ["batch_renorm", "sync_batch_norm"]
