"""What the normalised LSTMs share with ``nn.LSTM``: parameters and their names, layers and directions, packed sequences."""

# T steps, N samples, L layers, D directions, H hidden units, M rows of a packed sequence

import math
import warnings
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from syncnorm.functional._lstm import LSTMNorms, lstm_layer

__all__ = ["NormLSTM"]

State = tuple[Tensor, Tensor]


class NormLSTM(nn.Module):
    """Base of LSTMs with norms; the constructor and the forward of ``nn.LSTM``, without ``proj_size``.

    Parameters have the names and shapes of ``nn.LSTM``'s, with those of the norms beside them, so that a state dict of
    ``nn.LSTM`` loads with ``strict=False``.
    """

    gain: float = 1.0
    """What the weights of the norms start as."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is a probability, between 0 and 1; got {dropout}.")
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout acts between layers, so dropout={dropout} does nothing with num_layers=1.", stacklevel=3
            )
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        for name, width in self._passes():
            shapes: dict[str, tuple[int, ...]]
            shapes = {f"weight_ih{name}": (4 * hidden_size, width), f"weight_hh{name}": (4 * hidden_size, hidden_size)}
            if bias:
                shapes |= {f"bias_ih{name}": (4 * hidden_size,), f"bias_hh{name}": (4 * hidden_size,)}
            for key, shape in (shapes | self._norm_parameters(name)).items():
                self.register_parameter(key, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._make_buffers(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and biases as ``nn.LSTM``, uniform within ±1/√H; norms with their first gain and without bias."""
        bound = 1 / math.sqrt(self.hidden_size)
        for key, parameter in self.named_parameters(recurse=False):
            if key.startswith(("weight_", "bias_")):
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.constant_(parameter, 0.0 if "bias" in key else self.gain)

    def flatten_parameters(self) -> None:
        """Nothing, as no kernel here wants them in one block; so that code written for ``nn.LSTM`` runs."""

    @overload
    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]: ...
    @overload
    def forward(self, input: PackedSequence, hx: State | None = None) -> tuple[PackedSequence, State]: ...

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Any, State]:
        """Run over sequences, as ``nn.LSTM``.

        Args:
            input: ``[T, N, input_size]``, or ``[N, T, input_size]`` with ``batch_first``, or ``[T, input_size]`` without a
                batch, or a packed sequence.
            hx: h and c before the first step, ``[L·D, N, H]`` each (``[L·D, H]`` without a batch); zeros by default.

        Returns:
            h of the last layer after each step, ``[T, N, D·H]`` or in the form of ``input``; and h and c of all layers after
            each sequence's last step, shaped as ``hx``.

        Raises:
            ValueError: If shapes do not fit, or there is no step.
            TypeError: If the input is not floating point.
        """
        if isinstance(input, PackedSequence):
            sizes, order = input.batch_sizes.tolist(), input.sorted_indices
            self._check(input.data, None)
            state = self._state(hx, input.data, sizes[0], batched=True)
            if order is not None:
                h, c = (s.index_select(1, order) for s in state)
                state = (h, c)
            rows, final = self._run(input.data, sizes, state)
            back = input.unsorted_indices
            packed = PackedSequence(rows, input.batch_sizes, order, back)
            return packed, final if back is None else (final[0].index_select(1, back), final[1].index_select(1, back))
        self._check(input, (2, 3))
        batched = input.dim() == 3
        x = input.transpose(0, 1) if batched and self.batch_first else input if batched else input.unsqueeze(1)
        steps, samples = x.size(0), x.size(1)
        if not steps:
            raise ValueError(f"{self._name()} needs at least one step, got an input {list(input.shape)}.")
        state = self._state(hx, x, samples, batched=batched)
        rows, final = self._run(x.reshape(steps * samples, x.size(2)), [samples] * steps, state)
        y = rows.view(steps, samples, rows.size(1))
        if not batched:
            return y.squeeze(1), (final[0].squeeze(1), final[1].squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, final

    def _run(self, rows: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """All layers over the rows of a packed sequence."""
        walked, norms = self._norms(rows, sizes)
        last, flipped = _last_rows(sizes, rows.device), None
        h_n, c_n = [], []
        outputs: list[Tensor] = []
        for k, (name, _) in enumerate(self._passes()):
            reverse = name.endswith("_reverse")
            if not reverse and outputs:
                rows, outputs = torch.cat(outputs, 1), []
                rows = functional.dropout(rows, self.dropout, self.training)
            if reverse and flipped is None:
                flipped = _flipped_rows(sizes, rows.device)
            x = rows if not reverse or flipped is None else rows.index_select(0, flipped)
            weight_ih, weight_hh = getattr(self, f"weight_ih{name}"), getattr(self, f"weight_hh{name}")
            bias = getattr(self, f"bias_ih{name}") + getattr(self, f"bias_hh{name}") if self.bias else None
            hs, cs = lstm_layer(x, walked, (state[0][k], state[1][k]), weight_ih, weight_hh, bias, norms[k])
            # From the rows of all steps, so that a backward from these alone walks the steps of other ranks, too.
            h_n.append(hs.index_select(0, last))
            c_n.append(cs.index_select(0, last))
            outputs.append(hs if not reverse or flipped is None else hs.index_select(0, flipped))
        return torch.cat(outputs, 1), (torch.stack(h_n), torch.stack(c_n))

    def _passes(self) -> list[tuple[str, int]]:
        """Suffix of the parameters and input width of each layer and direction, in order."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        widths = [self.input_size] + [self.hidden_size * len(suffixes)] * (self.num_layers - 1)
        return [(f"_l{layer}{suffix}", width) for layer, width in enumerate(widths) for suffix in suffixes]

    def _check(self, input: Tensor, dims: tuple[int, ...] | None) -> None:
        if not input.is_floating_point():
            raise TypeError(
                f"{self._name()} expects a floating-point input, got {input.dtype}. Convert it, for example with input.float()."
            )
        if dims is not None and input.dim() not in dims:
            order = "[N, T, input_size]" if self.batch_first else "[T, N, input_size]"
            raise ValueError(
                f"{self._name()} expects {order}, [T, input_size] or a packed sequence, got an input {list(input.shape)}."
            )
        if input.size(-1) != self.input_size:
            raise ValueError(
                f"{self._name()} expects {self.input_size} features in the last dim, got an input {list(input.shape)}."
            )
        self._check_dtype("input", input)

    def _check_dtype(self, what: str, tensor: Tensor) -> None:
        wanted = self.weight_hh_l0.dtype
        if tensor.dtype != wanted and not torch.is_autocast_enabled(tensor.device.type):
            raise ValueError(
                f"{self._name()} has weights of {wanted}, got an {what} of {tensor.dtype}. Convert one of them, for example "
                f"with {what}.to({wanted})."
            )

    def _state(self, hx: State | None, input: Tensor, samples: int, *, batched: bool) -> State:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            zeros = input.new_zeros(layers, samples, self.hidden_size)
            return zeros, zeros
        if isinstance(hx, Tensor) or len(hx) != 2:
            got = "one tensor" if isinstance(hx, Tensor) else f"{len(hx)} of them"
            raise ValueError(f"{self._name()} expects hx to be a pair of tensors, (h_0, c_0); got {got}.")
        wanted = [layers, samples, self.hidden_size] if batched else [layers, self.hidden_size]
        for name, part in zip(("h_0", "c_0"), hx, strict=True):
            if list(part.shape) != wanted:
                raise ValueError(f"{self._name()} expects {name} of shape {wanted}, got {list(part.shape)}.")
        self._check_dtype("h_0", hx[0])
        return hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))

    def _name(self) -> str:
        return f"{type(self).__name__}({self.input_size}, {self.hidden_size})"

    def _norm_parameters(self, name: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters of the norms of one layer and direction."""
        gates, cell = (4 * self.hidden_size,), (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {f"norm_ih{name}": gates, f"norm_hh{name}": gates}
        shapes[f"norm_cell{name}"] = cell
        return shapes | ({f"norm_cell_bias{name}": cell} if self.bias else {})

    def _make_buffers(self, device: Any, dtype: torch.dtype | None) -> None:
        pass

    def _norms(self, rows: Tensor, sizes: list[int]) -> tuple[list[int], Sequence[LSTMNorms]]:
        """How many samples to walk at each step, and the norms of each layer and direction."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The arguments that are not the default, as ``nn.LSTM``."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        others = [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join([str(self.input_size), str(self.hidden_size), *others])


def _offsets(sizes: list[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


def _lengths(sizes: list[int]) -> list[int]:
    """Steps of each sample."""
    lengths = [0] * (sizes[0] if sizes else 0)
    for size in sizes:
        for sample in range(size):
            lengths[sample] += 1
    return lengths


def _last_rows(sizes: list[int], device: torch.device) -> Tensor:
    """Row of each sample's last step, ``[N]``."""
    offsets = _offsets(sizes)
    return torch.tensor([offsets[n - 1] + i for i, n in enumerate(_lengths(sizes))], dtype=torch.int64, device=device)


def _flipped_rows(sizes: list[int], device: torch.device) -> Tensor:
    """For each row, the row of the same sample that many steps from its end, ``[M]``; its own inverse."""
    offsets, lengths = _offsets(sizes), _lengths(sizes)
    rows = [offsets[lengths[i] - 1 - step] + i for step, size in enumerate(sizes) for i in range(size)]
    return torch.tensor(rows, dtype=torch.int64, device=device)
