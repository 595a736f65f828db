"""Ghost batch norm layers: one knob for the number of samples that share a statistic, below or above a rank's batch.

SyncBatchNorm with a ``virtual_batch_size`` is one of these.
"""

from typing import Any

import torch
from torch import Tensor

from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import LOCAL, Group, GroupSpec, resolve
from syncnorm.errors import SyncNormError
from syncnorm.functional._ghost_batch_norm import ghost_batch_norm
from syncnorm.functional._sync_batch_norm import tell_others
from syncnorm.modules._statistics import GHOSTS, SyncStatistics
from syncnorm.modules._sync_batch_norm import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__all__ = ["GhostBatchNorm", "GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _GhostBatchNorm(SyncStatistics):
    """Batch norm over ``virtual_batch_size`` samples, however large the batch of a rank is.

    Below the batch of a rank, the batch is cut into ghosts, each normalised by itself; above it, ranks are joined, each
    with its neighbours, so that a ghost is the batch of ``virtual_batch_size / batch`` consecutive ranks. Which of the two
    is found out once, at the first training forward, from the batches of all ranks; smaller batches that come later (the
    last of an epoch) make smaller ghosts. γ, β and the running statistics are shared by all ghosts of all ranks. Evaluation
    is batch norm's.

    Args:
        num_features: C, the size of dim 1 of the input.
        virtual_batch_size: Samples that share a statistic.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation.
        process_group: Which ranks share running statistics and may be joined, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        bias: With ``affine``, whether to learn the bias too.
        backend: Kernel backend, as in :class:`syncnorm.SyncBatchNorm`.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If ``virtual_batch_size`` is below 1, or neither cuts the batches of the ranks nor joins them; or as
            :class:`syncnorm.SyncBatchNorm`.
        SyncNormError: If the first training forward is compiled with more than one rank: what ranks agree on there has
            to run eagerly once.

    Reference: Hoffer, Hubara & Soudry (2017), arXiv:1705.08741, algorithm 1.
    """

    family = "ghost_batch_norm"
    virtual_batch_size: int
    _ranks_per_ghost: int

    def __init__(
        self,
        num_features: int,
        virtual_batch_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: object = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype,
            bias=bias, backend=backend,
        )  # fmt: skip
        self._arrive(virtual_batch_size)

    def _arrive(self, virtual_batch_size: int) -> None:
        if isinstance(virtual_batch_size, bool) or not isinstance(virtual_batch_size, int) or virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size is a number of samples, at least 1; got {virtual_batch_size!r}.")
        self.virtual_batch_size = virtual_batch_size
        self._ranks_per_ghost = 0  # not known yet

    def _change(self, virtual_batch_size: int) -> None:
        self._arrive(virtual_batch_size)

    def settings(self) -> dict[str, Any]:
        """What :meth:`adopt` needs to make a layer like this one."""
        return {**super().settings(), "virtual_batch_size": self.virtual_batch_size}

    def _leave(self) -> None:
        del self.virtual_batch_size, self._ranks_per_ghost

    def _normalize(self, input: Tensor) -> Tensor:
        tracked = not self.training or self.track_running_stats
        group = self._group() if self.training else LOCAL
        if self.training and not self._ranks_per_ghost and input.dim() >= 2:
            self._ranks_per_ghost = self._agree(input, group)
        return ghost_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.virtual_batch_size,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked if tracked else None,
            group=group,
            ghost_group=self._ghost_group(group),
            backend=self.backend,
            num_features=self.num_features,
            input_dims=self.input_dims,
            site=None if torch.compiler.is_compiling() else self,
        )

    def _ghost_group(self, group: Group) -> Group:
        """The ranks that make up one ghost."""
        if self._ranks_per_ghost < 2 or group.size == 1:
            return LOCAL
        return resolve(GroupSpec("size", size=self._ranks_per_ghost))

    def _tell_others(self, input: Tensor) -> None:
        if not self.training:
            return
        group = self._group()
        tell_others(input, self._ghost_group(group), self.num_features, self)
        if not self._ranks_per_ghost or (self.track_running_stats and self.running_mean is not None):
            tell_others(input, group, self.num_features, self)

    def _agree(self, input: Tensor, group: Group) -> int:
        """Ranks per ghost, from the first batches of all ranks: 1 if each is cut, more if they are joined."""
        batches = [input.size(0)]
        if group.size > 1:
            if torch.compiler.is_compiling():
                raise SyncNormError(
                    "ranks agree on their ghosts in the first training forward, which must not be compiled. Run one forward "
                    "before torch.compile."
                )
            word = torch.tensor([input.size(0)], dtype=torch.int64, device=input.device)
            batches = [int(n) for n in gather_rows(word, group).flatten().tolist()]
        size = self.virtual_batch_size
        if max(batches) >= size:
            return 1
        batch = max(batches)
        if group.size == 1 or self._group_spec != GroupSpec() or min(batches) != batch or size % batch:
            raise ValueError(
                f"virtual_batch_size={size} must be at most the batch of a rank, or a multiple of it that joins ranks of the "
                f"world; the ranks' batches are {batches} in process_group={self._group_spec}. Choose a divisor of the batch "
                "or such a multiple."
            )
        if group.size % (size // batch):
            raise ValueError(
                f"virtual_batch_size={size} joins {size // batch} ranks of batch {batch}, which must divide the number of "
                f"ranks, {group.size}."
            )
        return size // batch

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ranks_per_ghost": 0}

    def extra_repr(self) -> str:
        """The fields of the base, and the size of a ghost."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm(_GhostBatchNorm, SyncBatchNorm):
    __doc__ = str(_GhostBatchNorm.__doc__)


class GhostBatchNorm1d(_GhostBatchNorm, SyncBatchNorm1d):
    __doc__ = str(_GhostBatchNorm.__doc__)


class GhostBatchNorm2d(_GhostBatchNorm, SyncBatchNorm2d):
    __doc__ = str(_GhostBatchNorm.__doc__)


class GhostBatchNorm3d(_GhostBatchNorm, SyncBatchNorm3d):
    __doc__ = str(_GhostBatchNorm.__doc__)


GHOSTS.update(
    {
        SyncBatchNorm: GhostBatchNorm,
        SyncBatchNorm1d: GhostBatchNorm1d,
        SyncBatchNorm2d: GhostBatchNorm2d,
        SyncBatchNorm3d: GhostBatchNorm3d,
    }
)
