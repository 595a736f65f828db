"""The norms of an LSTM with batch normalisation: statistics of their own for each time step, over the ranks of a group."""

# T_max time steps with statistics, H hidden units

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncnorm.distributed.exchange import exchange_sums
from syncnorm.distributed.gather import gather_rows
from syncnorm.distributed.groups import Group
from syncnorm.functional._sync_batch_norm import sync_batch_norm

__all__ = ["BatchNorms", "agree_on_steps"]

_UNEVEN = (
    "BatchNormLSTM: a compiled training step needs sequences of the same length on all ranks, and they differ. Pad them, or "
    "run without torch.compile."
)


@dataclass
class BatchNorms:
    """Batch norms for :func:`syncnorm.functional.lstm_layer`: of W_h h, of W_x x and of the cell, step by step.

    At each step one call normalises the first two side by side, and one the cell: two exchanges forward, two backward. Gain
    and bias are shared by all steps. Steps from T_max on evaluate with the statistics of the last one that has any, and in
    training use those of their own batch and move none. A step that a single sample of the whole group has reached has no
    variance: it evaluates, in training too. (Not step 0, which is an error as in every batch norm.)

    Attributes:
        weight_ih: γ of W_x x, ``[4H]``.
        weight_hh: γ of W_h h, ``[4H]``.
        weight_cell: γ of the cell, ``[H]``.
        bias_cell: β of the cell, ``[H]`` or None.
        running_mean: ``[T_max, 9H]``: of W_h h, of W_x x, of the cell; moved in place when training, as are the next two.
        running_var: Unbiased, ``[T_max, 9H]``.
        num_batches_tracked: int64 ``[T_max]``.
        alone: Of each step, whether one sample of the whole group has reached it.
        training: Normalise by the batch.
        track: Whether a batch moves the running statistics.
        momentum: Weight of the new batch; None for the cumulative average.
        eps: Added to the variances.
        group: The ranks that meet.
        backend: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Reference: Cooijmans et al. (2017), arXiv:1603.09025, section 3.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    weight_cell: Tensor
    bias_cell: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    alone: Sequence[bool]
    training: bool
    track: bool
    momentum: float | None
    eps: float
    group: Group
    backend: str = "auto"
    site: object = None

    def __post_init__(self) -> None:
        self._weight = torch.cat([self.weight_hh, self.weight_ih])
        self._counter: Tensor | None = None

    def input(self, projected: Tensor) -> Tensor:
        """W_x x as it is: its norm needs the step."""
        return projected

    def gates(self, hidden: Tensor, projected: Tensor, step: int) -> Tensor:
        """BN(W_h h) + BN(W_x x), ``[n, 4H]``."""
        counter = self.num_batches_tracked[min(step, len(self.running_mean) - 1)]
        # Both calls of a step are one batch: the second counts on a copy.
        self._counter = counter.clone() if self.training else None
        both = torch.cat([hidden, projected], 1)
        hidden, projected = self._normalize(both, step, self._weight, None, counter, 0).chunk(2, 1)
        return hidden + projected

    def cell(self, cell: Tensor, step: int) -> Tensor:
        """BN(c), ``[n, H]``."""
        return self._normalize(cell, step, self.weight_cell, self.bias_cell, self._counter, len(self._weight))

    def _normalize(
        self, x: Tensor, step: int, weight: Tensor, bias: Tensor | None, counter: Tensor | None, start: int
    ) -> Tensor:
        last = len(self.running_mean) - 1
        training = self.training and (step == 0 or not self.alone[step])
        tracked = not training or (self.track and step <= last)
        statistics = [b[min(step, last), start : start + x.size(1)] for b in (self.running_mean, self.running_var)]
        mean, var = statistics if tracked else (None, None)
        return sync_batch_norm(
            x,
            mean,
            var,
            weight,
            bias,
            training,
            self.momentum,
            self.eps,
            num_batches_tracked=counter if training and tracked else None,
            group=self.group,
            backend=self.backend,
            site=self.site,
        )


def agree_on_steps(batch_sizes: Sequence[int], group: Group, device: torch.device) -> tuple[list[int], list[bool]]:
    """Bring the ranks of ``group`` to the same number of steps.

    A traced call cannot read what ranks answer, and its graph has as many steps as this rank: there the ranks must bring
    equally many, and all samples of a rank the same, which the graph asserts when it runs.

    Args:
        batch_sizes: Samples at each step of this rank.
        group: The ranks that meet: twice, and each reads the answer; once where the call is traced.
        device: To meet on.

    Returns:
        ``batch_sizes`` with zeros for the steps that only others have, and of each step whether a single sample of the
        whole group has reached it.
    """
    mine = list(batch_sizes)
    if group.size == 1:
        return mine, [size == 1 for size in mine]
    lengths = gather_rows(torch.tensor([float(len(mine))], dtype=torch.float64, device=device), group)
    if torch.compiler.is_compiling():
        torch._assert_async(lengths.eq(float(len(mine))).all(), _UNEVEN)
        return mine, [False] * len(mine)
    mine += [0] * (int(lengths.max()) - len(mine))
    totals = exchange_sums(torch.tensor(mine, dtype=torch.float64, device=device), group)
    return mine, [total == 1 for total in totals.tolist()]
