"""Tier: no process. The gate algebra against nn.LSTM with the norms taken out; the norms against the paper in numpy."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import syncnorm
from syncnorm import BatchNormLSTM, LayerNormLSTM
from syncnorm.functional import _layer_norm_lstm, lstm_layer

SETTINGS = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.4, "bidirectional": True},
]


class Identity:
    """Norms that are none."""

    def input(self, projected: Tensor) -> Tensor:
        return projected

    def gates(self, hidden: Tensor, projected: Tensor, step: int) -> Tensor:
        return hidden + projected

    def cell(self, cell: Tensor, step: int) -> Tensor:
        return cell


class Plain(LayerNormLSTM):
    def _norms(self, rows, sizes):
        return sizes, [Identity()] * len(self._passes())


def pair(settings: dict) -> tuple[Plain, nn.LSTM]:
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 5, **settings).double()
    ours = Plain(4, 5, **settings).double()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("norm_") for key in missing)
    return ours, theirs


def ragged(lengths=(2, 6, 1, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in lengths]


def flat(out) -> list[Tensor]:
    y, (h, c) = out
    return [y.data if isinstance(y, PackedSequence) else y, h, c]


def compare(ours: nn.Module, theirs: nn.Module, x, leaves: list[Tensor], hx=None) -> None:
    results = []
    for lstm in (ours, theirs):
        torch.manual_seed(5)  # the same dropout
        out = lstm(x, hx)
        flatted = flat(out)
        loss = sum((part.pow(3) * torch.linspace(-1, 2, part.numel()).view_as(part)).sum() for part in flatted)
        parameters = [p for name, p in lstm.named_parameters() if not name.startswith("norm_")]
        results.append([*flatted, *torch.autograd.grad(loss, [*leaves, *parameters], retain_graph=True)])
        if isinstance(x, PackedSequence):
            assert torch.equal(out[0].batch_sizes, x.batch_sizes)
            assert out[0].sorted_indices is x.sorted_indices and out[0].unsorted_indices is x.unsorted_indices
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_without_norms_it_is_torchs_lstm(settings: dict) -> None:
    ours, theirs = pair(settings)
    layers = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    shape = (3, 7, 4) if settings.get("batch_first") else (7, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(layers, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compare(ours, theirs, x, [x])
    compare(ours, theirs, x, [x, *hx], hx)
    compare(ours.eval(), theirs.eval(), x, [x])


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_packed_and_unbatched_sequences_are_torchs(settings: dict) -> None:
    ours, theirs = pair(settings)
    layers = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    sequences = ragged()
    hx = tuple(torch.randn(layers, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compare(ours, theirs, pack_sequence(sequences, enforce_sorted=False), sequences)
    compare(ours, theirs, pack_sequence(sequences, enforce_sorted=False), [*sequences, *hx], hx)
    by_length = sorted(sequences, key=len, reverse=True)
    compare(ours, theirs, pack_sequence(by_length), by_length)
    hx = tuple(torch.randn(layers, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compare(ours, theirs, sequences[1], [sequences[1], *hx], hx)


def layer_norm(z: np.ndarray, gain: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    return gain * (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5) + bias


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def randomised(**settings) -> LayerNormLSTM:
    torch.manual_seed(2)
    lstm = LayerNormLSTM(4, 5, **settings).double()
    for parameter in lstm.parameters():
        parameter.data.normal_()
    return lstm


def test_norms_are_the_papers() -> None:
    lstm, x = randomised(), torch.randn(6, 3, 4, dtype=torch.float64)
    w = {name.removesuffix("_l0"): p.detach().numpy() for name, p in lstm.named_parameters()}
    h, c, expected = np.zeros((3, 5)), np.zeros((3, 5)), []
    for step in x.numpy():
        gates = layer_norm(h @ w["weight_hh"].T, w["norm_hh"], w["bias_hh"])
        gates = gates + layer_norm(step @ w["weight_ih"].T, w["norm_ih"], w["bias_ih"])
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(layer_norm(c, w["norm_cell"], w["norm_cell_bias"]))
        expected.append(h)
    y, (h_n, c_n) = lstm(x)
    np.testing.assert_allclose(y.detach(), np.stack(expected), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(h_n[0].detach(), h, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(c_n[0].detach(), c, rtol=1e-11, atol=1e-12)


def test_first_and_second_derivatives() -> None:
    lstm = LayerNormLSTM(2, 3, bidirectional=True).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, h, c: lstm(x, (h, c))[0], (x, *hx))
    assert torch.autograd.gradgradcheck(lambda x, h, c: lstm(x, (h, c))[0], (x, *hx))


def test_a_sequence_does_not_depend_on_its_neighbours_or_on_padding() -> None:
    lstm = randomised(num_layers=2, bidirectional=True)
    sequences = [s.detach() for s in ragged()]
    padded, lengths = pad_packed_sequence(lstm(pack_sequence(sequences, enforce_sorted=False))[0])
    for i, sequence in enumerate(sequences):
        torch.testing.assert_close(padded[: lengths[i], i], lstm(sequence)[0], rtol=1e-11, atol=1e-12)


def test_gain_of_the_input_does_not_matter() -> None:
    lstm, x = randomised(), torch.randn(6, 3, 4, dtype=torch.float64)
    before = lstm(x)[0]
    with torch.no_grad():
        lstm.weight_ih_l0 *= 1e6
        lstm.weight_hh_l0 *= 1e6
    exact = lstm(x)[0]  # what remains of eps at 1e6 is nothing; at 1 it is 1e-5 of the variance
    torch.testing.assert_close(before, exact, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        lstm.weight_ih_l0 *= 3
    torch.testing.assert_close(lstm(x)[0], exact, rtol=1e-10, atol=1e-10)


def test_state_copies_dtypes_and_empty_batches() -> None:
    lstm = randomised(num_layers=2)
    names = set(nn.LSTM(4, 5, 2).state_dict())
    assert names | {f"norm_{kind}_l{k}" for kind in ("ih", "hh", "cell", "cell_bias") for k in (0, 1)} == set(
        lstm.state_dict()
    )
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    loaded = LayerNormLSTM(4, 5, 2).double()
    loaded.load_state_dict(lstm.state_dict())
    for twin in (loaded, copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(twin(x)[0], lstm(x)[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y, (h, c) = copy.deepcopy(lstm).to(dtype)(x.to(dtype))
        assert y.dtype == h.dtype == c.dtype == dtype
        assert float((y.double() - lstm(x)[0]).detach().abs().max()) < 60 * torch.finfo(dtype).eps
    y, (h, c) = lstm(x[:, :0])
    assert y.shape == (3, 0, 5) and h.shape == c.shape == (2, 0, 5)
    fresh = LayerNormLSTM(4, 5)
    assert fresh.norm_ih_l0.eq(1).all() and fresh.norm_cell_bias_l0.eq(0).all()
    assert fresh.weight_ih_l0.abs().max() <= 5**-0.5
    fresh.flatten_parameters()
    assert repr(LayerNormLSTM(4, 5, 2, batch_first=True)) == "LayerNormLSTM(4, 5, num_layers=2, batch_first=True)"


@pytest.mark.parametrize("kind", [LayerNormLSTM, lambda *sizes: BatchNormLSTM(*sizes, max_length=6)])
def test_weights_may_be_plain_tensors_or_what_a_parametrization_makes(kind) -> None:
    layer, x = kind(4, 5).eval(), torch.randn(6, 3, 4)
    want = layer(x)[0]
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    assert torch.equal(torch.func.functional_call(kind(4, 5).eval(), state, (x,))[0], want)
    torch.testing.assert_close(parametrizations.weight_norm(layer, "weight_hh_l0")(x)[0], want)


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    lstm, x = randomised(num_layers=2, bidirectional=True), torch.randn(3, 2, 4, dtype=torch.float64)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], lstm(x)[0])
    torch.testing.assert_close(torch.export.export(lstm.eval(), (x,)).module()(x)[0], lstm(x)[0])


def test_function_takes_any_norms() -> None:
    lstm = randomised()
    norms = _layer_norm_lstm.LayerNorms(
        lstm.norm_ih_l0, lstm.norm_hh_l0, lstm.norm_cell_l0, lstm.norm_cell_bias_l0, lstm.eps
    )
    x, zeros = torch.randn(3, 2, 4, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
    weights = (lstm.weight_ih_l0, lstm.weight_hh_l0)
    h, c = lstm_layer(x.flatten(0, 1), [2, 2, 2], (zeros, zeros), *weights, bias, norms)
    assert torch.equal(h.view(3, 2, 5), lstm(x)[0]) and torch.equal(c[-2:], lstm(x)[1][1][0])


def test_bad_input_and_settings_are_refused() -> None:
    lstm = LayerNormLSTM(4, 5)
    with pytest.raises(ValueError, match=r"LayerNormLSTM\(4, 5\) expects 4 features in the last dim, .* \[3, 2, 6\]"):
        lstm(torch.randn(3, 2, 6))
    with pytest.raises(ValueError, match=r"expects \[T, N, input_size\], .* got an input \[1, 2, 3, 4\]"):
        lstm(torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"needs at least one step, got an input \[0, 2, 4\]"):
        lstm(torch.randn(0, 2, 4))
    with pytest.raises(ValueError, match=r"expects c_0 of shape \[1, 2, 5\], got \[1, 3, 5\]"):
        lstm(torch.randn(3, 2, 4), (torch.zeros(1, 2, 5), torch.zeros(1, 3, 5)))
    with pytest.raises(ValueError, match=r"expects hx to be a pair of tensors, \(h_0, c_0\); got one tensor"):
        lstm(torch.randn(3, 2, 4), torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"\(h_0, c_0\); got 1 of them"):
        lstm(torch.randn(3, 2, 4), (torch.zeros(1, 2, 5),))
    with pytest.raises(TypeError, match=r"LayerNormLSTM\(4, 5\) expects a floating-point input, got torch.int64"):
        lstm(torch.ones(3, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"4 features in the last dim"):
        lstm(pack_padded_sequence(torch.randn(3, 2, 6), [3, 1]))
    with pytest.raises(ValueError, match="hidden_size must be an int of at least 1, got 0"):
        LayerNormLSTM(4, 0)
    with pytest.raises(ValueError, match="dropout is a probability"):
        LayerNormLSTM(4, 5, 2, dropout=1.5)
    with pytest.raises(ValueError, match="eps must be positive"):
        LayerNormLSTM(4, 5, eps=0.0)
    with pytest.warns(UserWarning, match=r"dropout=0\.5 does nothing with num_layers=1"):
        syncnorm.LayerNormLSTM(4, 5, dropout=0.5)
