"""Tools for tests over several ranks on one machine, ours and yours."""

from syncnorm.testing.collectives import count_collectives
from syncnorm.testing.ranks import RankError, run_ranks

__all__ = ["RankError", "count_collectives", "run_ranks"]
