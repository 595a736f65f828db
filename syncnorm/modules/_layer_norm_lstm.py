"""An LSTM with layer normalisation."""

from typing import Any

import torch
from torch import Tensor

from syncnorm.functional._layer_norm_lstm import LayerNorms
from syncnorm.modules._lstm import NormLSTM

__all__ = ["LayerNormLSTM"]


class LayerNormLSTM(NormLSTM):
    """LSTM with layer normalisation of W_h h, of W_x x, and of the cell before its tanh.

        (i, f, g, o) = LN(W_h h; γ_h) + LN(W_x x; γ_x) + b
        c = σ(f)·c + σ(i)·tanh(g)
        h = σ(o)·tanh(LN(c; γ_c, β_c))

    The interface of ``nn.LSTM``: layers, directions, dropout, packed sequences, shapes, and the names of its parameters
    (the biases of the first two norms are the LSTM's own). The norm of the gates is over all four together, as in the
    paper. Sequences do not depend on each other, so evaluation is training without dropout and ranks have nothing to say.

    Args:
        input_size: Features of the input.
        hidden_size: H.
        num_layers: Layers on top of each other.
        bias: Have biases, that of the cell's norm included.
        batch_first: Inputs and outputs are ``[N, T, *]``.
        dropout: Probability of dropping an output of any layer but the last, in training.
        bidirectional: Run over the reversed sequences, too.
        eps: Added to the variances.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        As ``nn.LSTM``; see :meth:`forward`.

    Attributes:
        norm_ih_l0: γ_x, ``[4H]``; ``_l1``, ``_l0_reverse`` ... for other layers and directions.
        norm_hh_l0: γ_h, ``[4H]``.
        norm_cell_l0: γ_c, ``[H]``.
        norm_cell_bias_l0: β_c, ``[H]``.

    Reference: Ba, Kiros & Hinton (2016), arXiv:1607.06450, equations 20 to 22 of the supplement.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}.")
        self.eps = eps

    def _norms(self, rows: Tensor, sizes: list[int]) -> tuple[list[int], list[LayerNorms]]:
        return sizes, [
            LayerNorms(
                getattr(self, f"norm_ih{name}"),
                getattr(self, f"norm_hh{name}"),
                getattr(self, f"norm_cell{name}"),
                getattr(self, f"norm_cell_bias{name}") if self.bias else None,
                self.eps,
            )
            for name, _ in self._passes()
        ]
