"""Tier: gloo ranks. BatchNormLSTM against a loop over time with torch's batch norm, and over ranks with ragged sequences."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm import BatchNormLSTM
from syncnorm.testing import count_collectives, run_ranks

H = 3


def randomised(**settings) -> BatchNormLSTM:
    torch.manual_seed(0)
    lstm = BatchNormLSTM(2, H, **({"max_length": 6} | settings)).double()
    for parameter in lstm.parameters():
        parameter.data.normal_()
    return lstm


class Loop(nn.Module):
    """One layer, one direction, all sequences padded to the longest; written out with torch's batch norm at each step."""

    def __init__(self, lstm: BatchNormLSTM, suffix: str = "_l0") -> None:
        super().__init__()
        self.w = nn.ParameterDict(
            {n.removesuffix(suffix): p.detach().clone() for n, p in lstm.named_parameters() if n.endswith(suffix)}
        )
        self.statistics = {n.removesuffix(suffix): b.clone() for n, b in lstm.named_buffers() if n.endswith(suffix)}
        self.momentum, self.eps, self.max_length = lstm.momentum, lstm.eps, lstm.max_length

    def norm(self, z: Tensor, t: int, columns: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean, var = (
            self.statistics[f"running_{name}"][min(t, self.max_length - 1), columns] for name in ("mean", "var")
        )
        if not self.training or len(z) == 1:
            return F.batch_norm(z, mean, var, weight, bias, False, 0.0, self.eps)
        if t >= self.max_length:
            return F.batch_norm(z, None, None, weight, bias, True, 0.0, self.eps)
        momentum = self.momentum or 1 / (1 + int(self.statistics["num_batches_tracked"][t]))
        return F.batch_norm(z, mean, var, weight, bias, True, momentum, self.eps)

    def forward(self, sequences: list[Tensor], h: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        w, outputs = self.w, [[] for _ in sequences]
        hs, cs = list(h), list(c)
        for t in range(max(map(len, sequences))):
            alive = [i for i, s in enumerate(sequences) if len(s) > t]
            x = torch.stack([sequences[i][t] for i in alive])
            h, c = torch.stack([hs[i] for i in alive]), torch.stack([cs[i] for i in alive])
            gates = self.norm(h @ w["weight_hh"].T, t, slice(0, 4 * H), w["norm_hh"], None)
            gates = gates + self.norm(x @ w["weight_ih"].T, t, slice(4 * H, 8 * H), w["norm_ih"], None)
            i, f, g, o = (gates + w["bias_ih"] + w["bias_hh"]).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm(c, t, slice(8 * H, 9 * H), w["norm_cell"], w["norm_cell_bias"]).tanh()
            if self.training and len(alive) > 1 and t < self.max_length:
                self.statistics["num_batches_tracked"][t] += 1
            for row, k in enumerate(alive):
                hs[k], cs[k] = h[row], c[row]
                outputs[k].append(h[row])
        return [torch.stack(part) for part in outputs], torch.stack(hs), torch.stack(cs)


def ragged(lengths: list[int], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in lengths]


def states(n: int) -> tuple[Tensor, Tensor]:
    h, c = torch.randn(2, n, H, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return h, c


def loss_of(outputs: list[Tensor], h: Tensor, c: Tensor) -> Tensor:
    """A sum over samples, whose weights depend on the step and unit only."""
    parts = [(y.pow(3) * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs]
    return sum(parts, h.pow(2).sum() + c.sin().sum() + 0.0)


def run(lstm: BatchNormLSTM, sequences: list[Tensor], h: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    packed, (h_n, c_n) = lstm(pack_sequence(sequences, enforce_sorted=False), (h.unsqueeze(0), c.unsqueeze(0)))
    y, lengths = nn.utils.rnn.pad_packed_sequence(packed)
    return [y[:n, i] for i, n in enumerate(lengths)], h_n[0], c_n[0]


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 5, 3, 5], [6, 2, 4, 1, 4], [8, 8, 9]], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.filterwarnings("ignore:.*got . steps and has statistics:UserWarning")
def test_equals_the_loop_over_time(lengths: list[int], momentum: float | None) -> None:
    lstm = randomised(momentum=momentum)
    loop = Loop(lstm)
    for step in range(3):
        results = []
        for model, function in ((lstm, lambda *a: run(lstm, *a)), (loop, loop)):
            sequences = [s.requires_grad_() for s in ragged(lengths, step)]
            hx = tuple(s.clone().requires_grad_() for s in states(len(lengths)))
            outputs, h, c = function(sequences, *hx)
            gradients = torch.autograd.grad(loss_of(outputs, h, c), [*sequences, *hx, *model.parameters()])
            by_name = dict(zip([n.split(".")[-1].removesuffix("_l0") for n, _ in model.named_parameters()],
                               gradients[-len(list(model.parameters())):], strict=True))  # fmt: skip
            results.append([*outputs, h, c, *gradients[: len(sequences) + 2], *(by_name[n] for n in sorted(by_name))])
        for mine, exact in zip(*results, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-10)
        for name, value in loop.statistics.items():
            torch.testing.assert_close(lstm.get_buffer(f"{name}_l0"), value, rtol=1e-11, atol=1e-11)
    lstm.eval(), loop.eval()
    sequences, hx = ragged([3, 7, 1]), states(3)
    for mine, exact in zip(run(lstm, sequences, *hx)[0], loop(sequences, *hx)[0], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-10)


def test_layers_and_directions_are_chained_single_ones() -> None:
    lstm = randomised(num_layers=2, bidirectional=True)
    sequences = ragged([2, 5, 3, 5])
    zeros = torch.zeros(4, H, dtype=torch.float64)
    padded, _ = lstm(pack_sequence(sequences, enforce_sorted=False))
    y, lengths = nn.utils.rnn.pad_packed_sequence(padded)
    rows, loops = sequences, []
    for layer in range(2):
        ahead, back = (Loop(randomised(num_layers=2, bidirectional=True), f"_l{layer}{s}") for s in ("", "_reverse"))
        forward = ahead(rows, zeros, zeros)[0]
        # a step of the reverse direction is counted from each sequence's own end
        reverse = [part.flip(0) for part in back([row.flip(0) for row in rows], zeros, zeros)[0]]
        rows = [torch.cat(both, 1) for both in zip(forward, reverse, strict=True)]
        loops += [(f"_l{layer}", ahead), (f"_l{layer}_reverse", back)]
    for i, row in enumerate(rows):
        torch.testing.assert_close(y[: lengths[i], i], row, rtol=1e-9, atol=1e-10)
    for suffix, loop in loops:
        for name, value in loop.statistics.items():
            torch.testing.assert_close(lstm.get_buffer(f"{name}{suffix}"), value, rtol=1e-9, atol=1e-10)


def start_of(passes: int, samples: int) -> Tensor:
    """States before step 0, different for every sample: W_h h of equal ones has no variance, and 1/sqrt(eps) in its place."""
    return torch.randn(2, passes, samples, H, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def _over_ranks(per_rank: list[list[int]], settings: dict) -> dict[str, Tensor]:
    rank, lengths = dist.get_rank(), per_rank[dist.get_rank()]
    lstm = randomised(**settings)
    everything = ragged([n for lengths in per_rank for n in lengths])
    start = sum(map(len, per_rank[:rank]))
    mine = [s.requires_grad_() for s in everything[start : start + len(lengths)]]
    steps = max(map(max, filter(None, per_rank)))
    passes = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    with count_collectives() as counts:
        if mine:
            hx = start_of(passes, sum(map(len, per_rank)))[:, :, start : start + len(mine)]
            packed, (h, c) = lstm(pack_sequence(mine, enforce_sorted=False), tuple(hx))
            outputs = packed.data
        else:  # an empty shard has no packed form
            outputs, (h, c) = lstm(torch.zeros(2, 0, 2, dtype=torch.float64, requires_grad=True))
        loss = outputs.pow(3).sum() + h.pow(2).sum() + c.sin().sum()
        gradients = torch.autograd.grad(loss, [*mine, *lstm.parameters()])
        assert counts == {"all_reduce": 2 + 4 * steps * passes}
    with count_collectives() as counts:
        lstm.eval()(torch.zeros(4, 2, 2, dtype=torch.float64))
    assert not counts
    out = {f"dx {start + i}": g for i, g in enumerate(gradients[: len(mine)])}
    names = [name for name, _ in lstm.named_parameters()]
    out |= {f"sum {name}": g for name, g in zip(names, gradients[len(mine) :], strict=True)}
    out |= {f"h {start + i}": h[:, i].detach() for i in range(len(mine))}
    return out | dict(lstm.named_buffers())


@pytest.mark.gloo
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize(
    "per_rank",
    [[[4, 4, 4], [4, 4, 4]], [[2, 5, 5, 2], [3, 5, 5]], [[6, 6, 6, 1], [], [2, 6, 6]]],
    ids=["even", "uneven", "empty"],
)
def test_ranks_with_ragged_sequences_equal_one_process(per_rank: list[list[int]], settings: dict) -> None:
    lstm = randomised(**settings)
    everything = [s.requires_grad_() for s in ragged([n for lengths in per_rank for n in lengths])]
    passes = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    packed, (h, c) = lstm(pack_sequence(everything, enforce_sorted=False), tuple(start_of(passes, len(everything))))
    loss = packed.data.pow(3).sum() + h.pow(2).sum() + c.sin().sum()
    gradients = torch.autograd.grad(loss, [*everything, *lstm.parameters()])
    exact = {f"dx {i}": g for i, g in enumerate(gradients[: len(everything)])}
    exact |= {f"sum {n}": g for (n, _), g in zip(lstm.named_parameters(), gradients[len(everything) :], strict=True)}
    exact |= {f"h {i}": h[:, i].detach() for i in range(len(everything))} | dict(lstm.named_buffers())
    # No step above is reached by one sequence alone: that would have no exchange.
    results = run_ranks(_over_ranks, len(per_rank), per_rank, settings)
    for name, value in exact.items():
        if name.startswith("sum "):
            found = [torch.stack([r[name] for r in results]).sum(0)]
        else:
            found = [r[name] for r in results if name in r]
        assert len(found) == (1 if name.split()[0] in ("sum", "dx", "h") else len(per_rank))
        for mine in found:
            scale = max(1.0, float(value.abs().max()))
            assert float((mine - value).abs().max()) <= 1e-12 * scale, name
            assert name.startswith(("sum", "dx", "h")) or torch.equal(mine, results[0][name])


def _alone_at_the_end() -> tuple[Tensor, Tensor]:
    lstm = randomised()
    sequences = [[5, 2], [2]][dist.get_rank()]
    packed, (h, _) = lstm(pack_sequence(ragged([5, 2, 2])[2 * dist.get_rank() :][: len(sequences)]))
    packed.data.sum().backward()
    return lstm.num_batches_tracked_l0, h


@pytest.mark.gloo
def test_a_sequence_that_goes_on_alone_is_evaluated_there() -> None:
    lstm = randomised()
    _, (h, _) = lstm(pack_sequence(ragged([5, 2, 2])))
    assert lstm.num_batches_tracked_l0.tolist() == [1, 1, 0, 0, 0, 0]
    (tracked, first), (_, second) = run_ranks(_alone_at_the_end, 2)
    assert torch.equal(tracked, lstm.num_batches_tracked_l0)
    torch.testing.assert_close(torch.cat([first, second], 1), h, rtol=1e-10, atol=1e-10)


def _one_rank_refuses() -> str:
    lstm = BatchNormLSTM(2, H, max_length=3)
    try:
        lstm(torch.randn(3, 2, 2 + dist.get_rank()))
    except (ValueError, syncnorm.SyncNormMismatch) as error:
        assert not lstm.num_batches_tracked_l0.any()
        return str(error)
    return "no error"


@pytest.mark.gloo
def test_a_rank_that_refuses_its_input_lets_nobody_wait() -> None:
    first, second = run_ranks(_one_rank_refuses, 2)
    assert first.startswith("1 of 2 ranks refused")
    assert second.startswith("BatchNormLSTM(2, 3) expects 2 features in the last dim, got an input [3, 2, 3]")


def _one_rank_fails(where: str) -> tuple[str, str]:
    lstm, x = BatchNormLSTM(2, H, max_length=3), torch.randn(3, 2, 2)
    state = torch.zeros(1, 2, H)
    if dist.get_rank():
        x = x.double() if where == "before ranks meet" else x
        state = state.double() if where == "state" else state
        if where == "between two steps":
            lstm.weight_ih_l0.data = lstm.weight_ih_l0.data.double()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        lstm(x, (state, state))
    if where != "between two steps":
        assert not lstm.num_batches_tracked_l0.any()
    lstm.float()(torch.randn(3, 2, 2))  # nobody is out of step
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("where", "kind", "words"),
    [
        ("before ranks meet", "ValueError", "has weights of torch.float32, got an input of torch.float64. Convert"),
        ("state", "ValueError", "has weights of torch.float32, got an h_0 of torch.float64. Convert"),
        ("between two steps", "RuntimeError", "dtype"),
    ],
)
def test_a_failure_on_one_rank_lets_nobody_wait(where: str, kind: str, words: str) -> None:
    first, second = run_ranks(_one_rank_fails, 2, where, group_timeout=10.0)
    assert first[0] == "SyncNormMismatch" and "1 of 2 ranks refused their input to this call" in first[1]
    assert second[0] == kind and words in second[1]


def test_no_stats_update_normalises_by_the_batch_and_moves_nothing() -> None:
    lstm, twin, x = randomised(), randomised(), torch.randn(3, 4, 2, dtype=torch.float64)
    before = copy.deepcopy(lstm.state_dict())
    with syncnorm.no_stats_update(nn.Sequential(lstm)):
        y, _ = lstm(x)
    torch.testing.assert_close(y, twin(x)[0])
    assert all(torch.equal(value, before[name]) for name, value in lstm.state_dict().items())
    lstm(x)
    assert torch.equal(lstm.running_mean_l0, twin.running_mean_l0)


def test_longer_sequences_reuse_the_last_statistics_and_say_so_once() -> None:
    lstm = randomised(max_length=2)
    for _ in range(3):
        lstm(torch.randn(2, 8, 2, dtype=torch.float64))
    lstm.eval()
    with pytest.warns(UserWarning, match=r"BatchNormLSTM\(2, 3\) got 5 steps and has statistics for max_length=2"):
        lstm(torch.randn(5, 3, 2, dtype=torch.float64))
    repeated = randomised(max_length=5).eval()
    for name, buffer in lstm.named_buffers():
        repeated.get_buffer(name).copy_(buffer[[0, 1, 1, 1, 1]])
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(lstm(x)[0], repeated(x)[0])
        before = lstm.running_mean_l0.clone()
        lstm.train()(x[:1])
        changed = (lstm.running_mean_l0 != before).any(1)
        assert changed.tolist() == [True, False]


def test_first_and_second_derivatives() -> None:
    lstm = randomised(max_length=3)
    x, (h, c) = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True), states(4)
    h, c = h[None].requires_grad_(), c[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h, c: lstm(x, (h, c))[0], (x, h, c), atol=1e-4)
    assert torch.autograd.gradgradcheck(lambda x, h, c: lstm(x, (h, c))[0], (x, h, c), atol=1e-3, rtol=1e-2)


def _checkpointed(use_reentrant: bool) -> bool:
    plain, twin = randomised(), randomised()
    x = ragged([4, 4, 4])
    a, b = (torch.stack(x, 1).requires_grad_() for _ in range(2))
    plain(a)[0].pow(3).sum().backward()
    with count_collectives() as counts:
        checkpoint(lambda t: twin(t)[0], b, use_reentrant=use_reentrant).pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    for name, value in plain.named_buffers():
        assert torch.equal(value, twin.get_buffer(name)), name
    return counts == {
        "all_reduce": 2 * 2 + 4 * 4
    }  # the number of steps, in two exchanges, is asked again; nothing else is


@pytest.mark.gloo
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_once(use_reentrant: bool) -> None:
    assert all(run_ranks(_checkpointed, 2, use_reentrant))


def test_state_copies_and_casts() -> None:
    lstm = randomised(num_layers=2)
    kinds = ("running_mean", "running_var", "num_batches_tracked", "norm_ih", "norm_hh", "norm_cell", "norm_cell_bias")
    assert set(lstm.state_dict()) == {*nn.LSTM(2, H, 2).state_dict(), *(f"{k}_l{n}" for k in kinds for n in (0, 1))}
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    lstm(x)
    loaded = randomised(num_layers=2)
    loaded.load_state_dict(lstm.state_dict())
    for twin in (loaded, copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(twin.eval()(x)[0], lstm.eval()(x)[0])
    low = copy.deepcopy(lstm).bfloat16().train()
    assert low.running_var_l1.dtype == torch.float64 and low.norm_ih_l0.dtype == torch.bfloat16
    y, (h, _) = low(x.bfloat16())
    assert y.dtype == h.dtype == torch.bfloat16 and y.isfinite().all()
    assert copy.deepcopy(lstm).float().running_var_l1.dtype == torch.float32
    assert BatchNormLSTM(2, H, max_length=2, dtype=torch.float16).running_var_l0.dtype == torch.float32
    fresh = BatchNormLSTM(2, H, max_length=2)
    assert fresh.norm_ih_l0.eq(0.1).all() and fresh.norm_cell_l0.eq(0.1).all() and fresh.norm_cell_bias_l0.eq(0).all()
    lstm.reset_running_stats()
    assert not lstm.num_batches_tracked_l1.any() and lstm.running_var_l1.eq(1).all()
    assert repr(fresh) == "BatchNormLSTM(2, 3, max_length=2, momentum=0.1, eps=1e-05)"


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    lstm, x = randomised().eval(), torch.randn(3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(lstm, fullgraph=True, backend="aot_eager")(x)[0], lstm(x)[0])
    torch.testing.assert_close(torch.export.export(lstm, (x,)).module()(x)[0], lstm(x)[0])
    torch._dynamo.reset()
    eager, compiled = randomised(), torch.compile(twin := randomised(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], eager(x)[0])
    for name, value in eager.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), value)


def _compiled(samples: list[int], steps: list[int]) -> float:
    torch._dynamo.reset()
    rank = dist.get_rank()
    x = torch.stack(ragged([max(steps)] * sum(samples)), 1)[: steps[rank], sum(samples[:rank]) :][:, : samples[rank]]
    eager, found = randomised(), []
    twin = copy.deepcopy(eager)
    twin.compile(fullgraph=True, backend="aot_eager")
    for lstm in (eager, twin) if len(set(steps)) == 1 else (twin,):
        x = x.clone().requires_grad_()
        y, (h, c) = lstm(x)
        gradients = torch.autograd.grad(y.pow(3).sum() + h.sum() + c.sum(), [x, *lstm.parameters()])
        found.append(torch.cat([t.detach().flatten() for t in (y, *gradients, *lstm.buffers())]))
    return float((found[0] - found[1]).abs().max())


def _compiled_cases() -> tuple[float, float, str]:
    even, empty = _compiled([3, 2], [2, 2]), _compiled([4, 0], [2, 2])
    with pytest.raises(RuntimeError, match="needs sequences of the same length on all ranks") as error:
        _compiled([3, 3], [3, 2])
    return even, empty, str(error.value)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_compiled_step_over_ranks_equals_the_eager_one() -> None:
    for uneven, empty, message in run_ranks(_compiled_cases, 2, timeout=180):
        assert max(uneven, empty) <= 1e-11
        assert "they differ. Pad them, or run without torch.compile" in message


def test_bad_input_and_settings_are_refused() -> None:
    lstm = BatchNormLSTM(2, H, max_length=3)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        lstm(torch.randn(3, 1, 2))
    assert not lstm.num_batches_tracked_l0.any()
    assert lstm.eval()(torch.randn(3, 1, 2))[0].shape == (3, 1, H)
    assert lstm(torch.randn(3, 2))[0].shape == (3, H)
    for bad, message in (({"max_length": 0}, "max_length is a number of time steps, at least 1; got 0"),
                         ({"max_length": 3, "eps": -1.0}, "eps must be positive"),
                         ({"max_length": 3, "backend": "fast"}, "backend must be one of")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            BatchNormLSTM(2, H, **bad)
