"""Differentiable public functions: core mathematics, a kernel backend and the meeting of ranks, joined."""

from syncnorm.functional._batch_renorm import batch_renorm
from syncnorm.functional._group_norm import group_norm
from syncnorm.functional._sync_batch_norm import sync_batch_norm

__all__ = [
    "batch_renorm",
    "group_norm",
    "sync_batch_norm",
]
