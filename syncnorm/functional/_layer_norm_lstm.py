"""The norms of an LSTM with layer normalisation."""

# N samples, H hidden units

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

__all__ = ["LayerNorms"]


class LayerNorms(NamedTuple):
    """Layer norms for :func:`syncnorm.functional.lstm_layer`: over all four gates together, and over the cell.

    The biases of the first two are the bias of the gates, so they are not repeated here.

    Attributes:
        weight_ih: Gain of W_x x, ``[4H]``.
        weight_hh: Gain of W_h h, ``[4H]``.
        weight_cell: Gain of the cell, ``[H]``.
        bias_cell: Bias of the cell, ``[H]`` or None.
        eps: Added to the variances.

    Reference: Ba, Kiros & Hinton (2016), arXiv:1607.06450, equations 20 to 22 of the supplement.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    weight_cell: Tensor
    bias_cell: Tensor | None
    eps: float

    def input(self, projected: Tensor) -> Tensor:
        """LN(W_x x), ``[M, 4H]``."""
        return functional.layer_norm(projected, self.weight_ih.shape, self.weight_ih, None, self.eps)

    def gates(self, hidden: Tensor, projected: Tensor, step: int) -> Tensor:
        """LN(W_h h) + LN(W_x x), ``[n, 4H]``."""
        return functional.layer_norm(hidden, self.weight_hh.shape, self.weight_hh, None, self.eps) + projected

    def cell(self, cell: Tensor, step: int) -> Tensor:
        """LN(c), ``[n, H]``."""
        return functional.layer_norm(cell, self.weight_cell.shape, self.weight_cell, self.bias_cell, self.eps)
