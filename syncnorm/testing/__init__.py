"""Tools for tests over several ranks on one machine, ours and yours."""

from syncnorm.testing.collectives import count_collectives
from syncnorm.testing.faults import FAULTS, FaultInjected, Injected, inject
from syncnorm.testing.ranks import RankError, run_ranks

__all__ = ["FAULTS", "FaultInjected", "Injected", "RankError", "count_collectives", "inject", "run_ranks"]
