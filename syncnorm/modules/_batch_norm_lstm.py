"""An LSTM with batch normalisation, whose statistics are per time step and of all ranks."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from syncnorm.distributed.exchange import send_poison
from syncnorm.distributed.gather import send_refusal
from syncnorm.distributed.groups import LOCAL
from syncnorm.distributed.ledger import begin_call
from syncnorm.errors import SyncNormError
from syncnorm.functional._batch_norm_lstm import BatchNorms, agree_on_steps
from syncnorm.functional._walk import was_told
from syncnorm.kernels import BACKENDS
from syncnorm.modules._lstm import NormLSTM
from syncnorm.modules._over_ranks import OverRanks

__all__ = ["BatchNormLSTM"]


class BatchNormLSTM(OverRanks, NormLSTM):
    """LSTM with batch normalisation of W_h h, of W_x x, and of the cell before its tanh, over all ranks.

        (i, f, g, o) = BN(W_h h; γ_h) + BN(W_x x; γ_x) + b
        c = σ(f)·c + σ(i)·tanh(g)
        h = σ(o)·tanh(BN(c; γ_c, β_c))

    Each time step has statistics of its own, as the first steps after an initial state are unlike the later ones; γ and β
    are shared by all steps. The cell that is carried on is not normalised. Evaluation uses the running statistics of each
    step. In the reverse direction a step is counted from each sequence's end.

    Steps from ``max_length`` on evaluate with the statistics of step ``max_length - 1``, and in training normalise by their
    own batch and move no statistics; a warning says so once. Where a single sequence of all ranks' batches goes on longer
    than the others, a batch has no variance, and those steps use the running statistics in training, too.

    Over ranks, training meets twice to agree on the number of steps (which may differ between ranks, as may the number of
    sequences, 0 included), then twice per step, layer and direction, and as often in the backward; evaluation never. A
    graph of torch.compile has a fixed number of steps: there the sequences of all ranks must be equally long, not packed.

    The first step's W_h h has no variance where the initial state is zero, so its gradient is scaled by 1/√eps. The paper
    adds a little noise to h_0; pass it as ``hx``. A state carried over from the chunk before is another first step than a
    zero state, and statistics of both mixed fit neither.

    Args:
        input_size: Features of the input.
        hidden_size: H.
        num_layers: Layers on top of each other.
        bias: Have biases, that of the cell's norm included.
        batch_first: Inputs and outputs are ``[N, T, *]``.
        dropout: Probability of dropping an output of any layer but the last, in training.
        bidirectional: Run over the reversed sequences, too.
        max_length: T_max, the number of time steps with statistics.
        gain: What γ starts as. At 1 the tanh saturates and gradients vanish; the paper found 0.1.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        eps: Added to the variances.
        process_group: Which ranks share statistics, as in :class:`syncnorm.SyncBatchNorm`.
        backend: Kernel backend, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Shape:
        As ``nn.LSTM``; see :meth:`forward`.

    Attributes:
        norm_ih_l0: γ_x, ``[4H]``; ``_l1``, ``_l0_reverse`` ... for other layers and directions.
        norm_hh_l0: γ_h, ``[4H]``.
        norm_cell_l0: γ_c, ``[H]``.
        norm_cell_bias_l0: β_c, ``[H]``.
        running_mean_l0: ``[T_max, 9H]``: of W_h h, of W_x x, of the cell. At least float32.
        running_var_l0: Unbiased, over the samples of all ranks, ``[T_max, 9H]``.
        num_batches_tracked_l0: Batches that have reached each step, int64 ``[T_max]``.

    Raises:
        ValueError: If shapes do not fit, or in training all ranks have one sequence in all.
        SyncNormMismatch: If another rank refused its input.

    Reference: Cooijmans et al. (2017), arXiv:1603.09025, equations 6 to 8 and section 3.
    """

    too_narrow = (torch.float16, torch.bfloat16)

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
        max_length: int,
        gain: float = 0.1,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        process_group: object = None,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length is a number of time steps, at least 1; got {max_length!r}.")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}.")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}.")
        self.max_length, self.gain, self.momentum, self.eps, self.backend = max_length, gain, momentum, eps, backend
        self._said_too_long = self._met = False
        settings = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)
        super().__init__(process_group, *settings)

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Any, tuple[Tensor, Tensor]]:
        """As :meth:`NormLSTM.forward`; a rank that refuses its input tells the others."""
        self._met = False
        try:
            return super().forward(input, hx)
        except SyncNormError:
            raise  # all ranks have it, or have been told
        except (ValueError, TypeError, RuntimeError) as error:
            if self.training and not torch.compiler.is_compiling():
                device = input.data.device if isinstance(input, PackedSequence) else input.device
                group = self._group()
                if not self._met:
                    send_refusal(1, device, group)
                elif isinstance(error, RuntimeError) and not was_told(error):  # between the exchanges of two steps
                    send_poison(0, device, group, begin_call(self, group, self.get_buffer("running_mean_l0")), "step")
            raise

    def reset_parameters(self) -> None:
        """As :meth:`NormLSTM.reset_parameters`; statistics start again, too."""
        super().reset_parameters()
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Statistics as they were at the start: mean 0, variance 1, no batches."""
        for name, _ in self._passes():
            self.get_buffer(f"running_mean{name}").zero_()
            self.get_buffer(f"running_var{name}").fill_(1)
            self.get_buffer(f"num_batches_tracked{name}").zero_()

    def _make_buffers(self, device: Any, dtype: torch.dtype | None) -> None:
        dtype = torch.float32 if dtype in self.too_narrow else dtype
        shape = (self.max_length, 9 * self.hidden_size)
        for name, _ in self._passes():
            self.register_buffer(f"running_mean{name}", torch.zeros(shape, device=device, dtype=dtype))
            self.register_buffer(f"running_var{name}", torch.ones(shape, device=device, dtype=dtype))
            counts = torch.zeros(self.max_length, dtype=torch.int64, device=device)
            self.register_buffer(f"num_batches_tracked{name}", counts)

    def _norms(self, rows: Tensor, sizes: list[int]) -> tuple[list[int], list[BatchNorms]]:
        group = self._group() if self.training else LOCAL
        self._met = True
        walked, alone = agree_on_steps(sizes, group, rows.device)
        if len(walked) > self.max_length and not self._said_too_long and not torch.compiler.is_compiling():
            self._said_too_long = True
            warnings.warn(
                f"{self._name()} got {len(walked)} steps and has statistics for max_length={self.max_length}. Later steps "
                f"evaluate with those of step {self.max_length - 1}, and in training use their own batch's. (Said once.)",
                stacklevel=4,
            )
        return walked, [
            BatchNorms(
                getattr(self, f"norm_ih{name}"),
                getattr(self, f"norm_hh{name}"),
                getattr(self, f"norm_cell{name}"),
                getattr(self, f"norm_cell_bias{name}") if self.bias else None,
                self.get_buffer(f"running_mean{name}"),
                self.get_buffer(f"running_var{name}"),
                self.get_buffer(f"num_batches_tracked{name}"),
                alone,
                self.training,
                self._tracks,
                self.momentum,
                self.eps,
                group,
                self.backend,
                None if torch.compiler.is_compiling() else self,
            )
            for name, _ in self._passes()
        ]

    def extra_repr(self) -> str:
        """The fields of the base, and ours."""
        return f"{super().extra_repr()}, max_length={self.max_length}, momentum={self.momentum}, eps={self.eps:g}"
