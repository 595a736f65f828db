"""One layer of an LSTM in one direction, with three places for a norm.

Sequences are rows as in a packed sequence: all samples at step 0, then those that last to step 1, and so on.
"""

# M rows, N samples, I inputs, H hidden units

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["LSTMNorms", "lstm_layer"]


class LSTMNorms(Protocol):
    """The three norms of a normalised LSTM."""

    def input(self, projected: Tensor) -> Tensor:
        """What is done to W_x x of all steps at once, ``[M, 4H]``."""

    def gates(self, hidden: Tensor, projected: Tensor, step: int) -> Tensor:
        """The sum of W_h h and of the rows of :meth:`input`, normalised, ``[n, 4H]``."""

    def cell(self, cell: Tensor, step: int) -> Tensor:
        """The cell on its way to the output, ``[n, H]``; what is carried on is not normalised."""


def lstm_layer(
    rows: Tensor,
    batch_sizes: Sequence[int],
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    norms: LSTMNorms,
) -> tuple[Tensor, Tensor]:
    """Run an LSTM whose gates and output see normalised values.

        (i, f, g, o) = gates(W_h h, input(W_x x)) + b
        c = σ(f)·c + σ(i)·tanh(g)
        h = σ(o)·tanh(cell(c))

    Args:
        rows: ``[M, I]``, the inputs of step 0, step 1, ...
        batch_sizes: Samples at each step, not increasing; 0 for steps that only other ranks have.
        state: h and c before step 0, ``[N, H]`` each.
        weight_ih: W_x, ``[4H, I]``, in torch's order of gates.
        weight_hh: W_h, ``[4H, H]``.
        bias: b, ``[4H]`` or None.
        norms: The norms. With those that return their argument (or sum) this is an LSTM.

    Returns:
        h and c after each step, rows ``[M, H]`` each.
    """
    projected = norms.input(functional.linear(rows, weight_ih))
    h, c = state
    hs, cs = [], []
    # Steps without samples are walked, too, and end up in what is returned: the backward then meets the other ranks there.
    for step, x in enumerate(projected.split(list(batch_sizes))):
        n = x.size(0)
        gates = norms.gates(functional.linear(h[:n], weight_hh), x, step)
        i, f, g, o = (gates if bias is None else gates + bias).chunk(4, 1)
        c = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norms.cell(c, step).tanh()
        hs.append(h)
        cs.append(c)
    return torch.cat(hs), torch.cat(cs)
