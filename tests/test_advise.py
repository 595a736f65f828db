"""Tier: no process, but for the last tests: gloo ranks. What advise measures and makes of it, and that it leaves no trace."""

import copy
import json
import random
import re
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm
from syncnorm.diagnostics._advice import THRESHOLDS, Evidence, decide
from syncnorm.diagnostics._exchange_meter import ExchangeMeter
from syncnorm.errors import SyncNormMismatch
from syncnorm.testing import RankError, run_ranks

DOCS = Path(__file__).resolve().parent.parent / "docs" / "choosing.md"


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def mlp(width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [[nn.Linear(n, width), nn.BatchNorm1d(width), nn.ReLU()] for n in (64, width, width)]
    return nn.Sequential(*chain(*hidden), nn.Linear(width, 10))


def actions(advice: syncnorm.diagnostics.Advice) -> set[str]:
    return {row.action for row in advice.rows}


# ------------------------------------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize(
    ("batch", "ranks", "expected"),
    [
        (2, None, {"GroupNorm"}),
        (2, 2, {"synchronise (world)"}),
        (2, 8, {"synchronise (world)"}),
        (4, None, {"batch renorm"}),
        (8, None, {"leave"}),
        (256, None, {"leave"}),
    ],
)
def test_digits_perceptron(batch: int, ranks: int | None, expected: set[str]) -> None:
    advice = syncnorm.advise(mlp(), digits()[0].split(batch), ranks=ranks)
    assert actions(advice) == expected
    assert bool(advice) == advice.ok == (expected == {"leave"})


def test_maps_count_by_their_size_and_only_the_last_layer_needs_help() -> None:
    # REFERENCE: a stride-2 net on digits breaks at batch 2 through its 1×1 maps alone.
    torch.manual_seed(0)
    channels = (1, 16, 32, 32, 32)
    stages = [[nn.Conv2d(a, b, 3, 1 + (a > 1), 1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in pairwise(channels)]
    net = nn.Sequential(*chain(*stages))
    advice = syncnorm.advise(net, digits()[0].view(-1, 1, 8, 8).split(2))
    assert [row.values for row in advice.rows] == [128, 32, 8, 2]
    assert [row.action for row in advice.rows] == ["leave", "leave", "leave", "GroupNorm"]
    assert advice.commands() == ["syncnorm.convert(model, to='group_norm', include=['10'])"]


def test_sorted_data_is_noticed() -> None:
    images, labels = digits()
    advice = syncnorm.advise(mlp(), images[labels.argsort()].split(16), None)
    assert actions(advice) == {"batch renorm"}
    assert "not drawn at random" in advice.rows[0].reason


def test_neighbours_that_are_alike_are_one_value() -> None:
    # Every pixel of a sample is the same number: maps of 16 count for one, and that is no fault of the loader.
    images = torch.randn(400, 8, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 4, 4)
    (row,) = syncnorm.advise(nn.BatchNorm2d(8), images.split(4), None).rows
    assert row.values == 64
    assert row.independent == pytest.approx(4, rel=0.15)
    assert "random" not in row.reason


@pytest.mark.parametrize(
    ("changes", "ranks", "per_node", "expected"),
    [
        ({}, 1, 1, "GroupNorm"),
        ({}, 16, 8, "synchronise (node)"),
        ({}, 16, 2, "synchronise (world)"),
        ({}, 2, 2, "synchronise (world)"),
        ({"share": 2}, 2, 2, "batch renorm"),  # already synchronised, over all there are
        ({"share": 4}, 4, 4, "leave"),
        ({"independent": 4.0}, 1, 1, "batch renorm"),
        ({"independent": 4.0, "family": "batch_renorm"}, 1, 1, "leave"),
        ({"independent": 4.0, "skew": 4.0}, 1, 1, "batch renorm"),
        ({"independent": 2.0, "skew": 4.0}, 1, 1, "GroupNorm"),
        ({"values": 512.0, "independent": 20.0}, 1, 1, "leave"),  # a map, and nobody to share with
        ({"values": 512.0, "independent": 20.0}, 16, 8, "synchronise (node)"),
        ({"values": 512.0, "independent": 20.0}, 16, 2, "synchronise (world)"),
        ({"values": 512.0, "independent": 20.0, "share": 2}, 2, 2, "leave"),
        ({"values": 512.0, "independent": 60.0}, 16, 8, "leave"),
        ({"samples": 20.0, "values": 20.0, "independent": 20.0}, 16, 8, "leave"),
        ({"gap": 0.1, "seen": 5000}, 1, 1, "freeze"),
        ({"gap": 0.1, "seen": 50}, 1, 1, "GroupNorm"),
        ({"gap": 0.4, "seen": 5000}, 1, 1, "GroupNorm"),
        ({"samples": 4096.0, "values": 4096.0, "independent": 4096.0}, 1, 1, "ghost"),
        ({"samples": 64.0, "independent": 64.0, "share": 1 / 32}, 1, 1, "ghost"),
        ({"fixed": "it is frozen"}, 8, 8, "leave"),
        ({"independent": 0.0}, 8, 8, "GroupNorm"),
    ],
    ids=str,
)
def test_the_rule(changes: dict[str, Any], ranks: int, per_node: int, expected: str) -> None:
    small = {"samples": 2.0, "values": 2.0, "independent": 2.0, "skew": None, "share": 1.0, "gap": None, "seen": 0}
    decision = decide(Evidence(**{**small, "fixed": "", "family": "batch_norm", **changes}), ranks, per_node)
    assert decision.action == expected, decision
    assert (decision.action == "leave") == (not decision.options)
    if changes.get("share") == 1 / 32:
        assert decision.options["virtual_batch_size"] == 8


def test_thresholds_are_those_of_the_document() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.,]+)", DOCS.read_text(), flags=re.MULTILINE)
    assert {name: float(value.replace(",", "")) for name, value in rows} == THRESHOLDS


# -------------------------------------------------------------------------------------------------------- what it measures


def test_noise_and_gap_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, 5, 3, 2, generator=generator, dtype=torch.float64) * 3 + 7 for n in (2, 5, 1, 9)]
    layer = nn.BatchNorm2d(5, dtype=torch.float64)
    layer.running_mean += 4
    layer.running_var *= 6
    (row,) = syncnorm.advise(nn.Sequential(layer), parts).rows

    flat = [part.permute(1, 0, 2, 3).reshape(5, -1).numpy() for part in parts]
    whole = np.concatenate(flat, 1)
    total = ((whole - whole.mean(1, keepdims=True)) ** 2).sum(1)
    between = sum(f.shape[1] * (f.mean(1) - whole.mean(1)) ** 2 for f in flat)
    assert row.noise == pytest.approx(np.mean(between / total), rel=1e-12)
    assert row.independent == pytest.approx(1 / np.mean(between / total * 4 / 3), rel=1e-12)
    assert (row.samples, row.values) == (17 / 4, 17 / 4 * 6)
    s, sigma = np.sqrt(6 + layer.eps), np.sqrt(whole.var(1) + layer.eps)
    evaluated, trained = (whole - 4) / s, (whole - whole.mean(1, keepdims=True)) / sigma[:, None]
    assert row.gap == pytest.approx(np.mean(np.sqrt(((evaluated - trained) ** 2).mean(1))), rel=1e-9)


class Pyramid(nn.Module):
    """One norm for two levels, of which the second is another kind of input; the second level may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.never = nn.BatchNorm1d(2, track_running_stats=False)

    def forward(self, x: Tensor) -> None:
        self.norm(x[:, :3])
        if len(x) != 4:
            self.norm(x[:, 3:])


def test_the_turns_of_a_shared_layer_are_statistics_of_their_own() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (3, 4, 2, 5)]
    for part in parts:
        part[:, 3:] = part[:, 3:] * 2 + 50
    shared, never = syncnorm.advise(Pyramid(), parts, ranks=2).rows

    between, total, gaps, values = np.zeros(3), np.zeros(3), np.zeros(3), 0
    for level, seen in ((slice(0, 3), parts), (slice(3, 6), [part for part in parts if len(part) != 4])):
        whole = torch.cat(seen)[:, level].numpy()
        mean, sigma = whole.mean(0), np.sqrt(whole.var(0) + 1e-5)
        between += sum(len(part) * (part[:, level].numpy().mean(0) - mean) ** 2 for part in seen)
        total += ((whole - mean) ** 2).sum(0)
        gaps += ((whole / np.sqrt(1 + 1e-5) - (whole - mean) / sigma) ** 2).sum(0)
        values += len(whole)
    assert shared.noise == pytest.approx(np.mean(between / total), rel=1e-10)
    assert shared.independent == pytest.approx(1 / np.mean(between / total * 7 / 5), rel=1e-10)
    assert (shared.samples, shared.gap) == (values / 7, pytest.approx(np.mean(np.sqrt(gaps / values)), rel=1e-9))
    assert shared.exchanges == 4, "forward and backward of both calls"
    assert (never.noise, never.gap, never.exchanges) == (None, None, 0)


def test_a_layers_noise_is_not_hidden_by_the_layers_before_it() -> None:
    advice = syncnorm.advise(mlp(), digits()[0].split(4), None)
    for row in advice.rows:  # were each batch normalised by itself, layers behind the first would show 0.4 %
        assert row.noise == pytest.approx(1 / 4, rel=0.1)


def test_a_single_batch_cannot_tell() -> None:
    advice = syncnorm.advise(mlp(), [digits()[0][:16]])
    assert [row.noise for row in advice.rows] == [None] * 3
    assert actions(advice) == {"leave"}
    assert "one batch cannot tell" in str(advice)


def test_what_is_fixed_is_left() -> None:
    net = mlp()
    net[1].eval()
    syncnorm.convert(net, "frozen_batch_norm", include="4")
    rows = syncnorm.advise(net, digits()[0].split(2)).rows
    assert [(row.action, row.reason) for row in rows[:2]] == [
        ("leave", "it is in evaluation mode while the model trains"), ("leave", "its statistics are frozen")
    ]  # fmt: skip
    assert rows[2].action == "GroupNorm"


@pytest.mark.parametrize(("group", "expected"), [("world", 8), ("node", 4), (2, 2), (16, 8)])
def test_a_converted_layer_shares_over_the_ranks_that_are_asked_for(group: Any, expected: int) -> None:
    net = syncnorm.convert(mlp(), process_group=group)
    rows = syncnorm.advise(net, digits()[0].split(4), ranks=8, ranks_per_node=4).rows
    assert {row.values / row.samples for row in rows} == {expected}
    assert {row.action for row in rows} == {"leave"}, "4 samples on 2 ranks are enough"
    with syncnorm.disabled(net):
        assert syncnorm.advise(net, digits()[0].split(4), ranks=8).rows[0].action == "synchronise (world)"


def test_no_more_batches_than_asked_for() -> None:
    taken: list[int] = []
    endless = (taken.append(0) or torch.randn(4, 64) for _ in iter(int, 1))
    assert syncnorm.advise(mlp(), endless, 11).num_batches == len(taken) == 11


# ------------------------------------------------------------------------------------------------------------- no trace left


class Noisy(nn.Module):
    """Draws random numbers from all three sources, and counts its calls in a buffer while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), syncnorm.SyncBatchNorm1d(6))
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        if self.training:
            self.calls += 1
        if self.fails:
            raise KeyError("no such sample")
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_exactly_as_before(fails: bool) -> None:
    model = Noisy()
    model.net(torch.randn(8, 64)).sum().backward()
    model.net[1].eval()
    handle = model.net[3].register_forward_hook(lambda *_: None)
    data = TensorDataset(torch.randn(64, 64))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    buffers = [id(buffer) for buffer in model.buffers()]
    grads = [p.grad.clone() for p in model.parameters()]
    drawn = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state(), loader.generator.get_state())
    model.fails = fails
    if fails:
        with pytest.raises(KeyError, match="no such sample"):
            syncnorm.advise(model, loader)
    else:
        syncnorm.advise(model, loader)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert hooks == [(int(module is model.net[3]), 0) for module in model.modules()]
    assert random.getstate() == drawn[0] and (np.random.get_state()[1] == drawn[1]).all()
    assert torch.equal(torch.get_rng_state(), drawn[2]) and torch.equal(loader.generator.get_state(), drawn[3])
    assert torch.is_grad_enabled()
    handle.remove()


def test_compiled_models_are_seen() -> None:
    net = mlp(16)
    compiled = torch.compile(net, backend="eager")
    x = digits()[0].split(2)
    compiled(x[0])
    assert str(syncnorm.advise(compiled, x)) == str(syncnorm.advise(net, x))


# ---------------------------------------------------------------------------------------------------------------- the report


def test_report_is_text_and_data() -> None:
    net = mlp()
    advice = syncnorm.advise(net, digits()[0].split(2), ranks=4)
    told = json.loads(json.dumps(advice.to_dict()))
    assert told["ok"] is False and told["ranks"] == 4 and told["exchanges"] == 6
    assert told["num_bytes"] == sum(row["num_bytes"] for row in told["rows"]) > 0
    assert [row["name"] for row in told["rows"]] == ["1", "4", "7"]
    text = str(advice)
    for words in ("synchronise (world): 1, 4, 7", "6 exchanges", "do: syncnorm.convert(model, ", "independent", " σ"):
        assert words in text
    (command,) = told["commands"]
    eval(command, {"syncnorm": syncnorm, "model": net})
    assert type(net[1]) is syncnorm.SyncBatchNorm1d


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "text"),
    [
        (nn.Linear(64, 2), [torch.zeros(2, 64)], {}, ValueError, "there is no batch norm to look at"),
        (
            nn.Sequential(nn.LazyBatchNorm1d()),
            [torch.zeros(2, 64)],
            {},
            ValueError,
            "0 is lazy, its channels are not known",
        ),
        (nn.LayerNorm(64), [torch.zeros(2, 64)], {}, ValueError, "have no statistics of a batch"),
        (mlp(8), [], {}, ValueError, "advise needs at least one batch with samples on some rank, got none"),
        (mlp(8), iter([torch.zeros(0, 64)]), {}, ValueError, "got none. Check the loader's length"),
        (mlp(8), [torch.full((2, 64), torch.nan)], {}, ValueError, "hold NaN or infinite values on some rank"),
        (mlp(8), [{"x": 1}], {}, TypeError, "forward=lambda model, batch"),
        (mlp(8), [torch.zeros(2, 64)], {"ranks": 0}, ValueError, "ranks must be a whole number of at least 1"),
        (mlp(8), [torch.zeros(2, 64)], {"num_batches": 2.0}, ValueError, "num_batches must be a whole number"),
        (mlp(8), [torch.zeros(2, 64)], {"include": "9"}, ValueError, "include"),
    ],
    ids=["no norm", "lazy", "sample norm", "empty", "no samples", "nan", "dict", "ranks", "num_batches", "include"],
)
def test_bad_input_is_one_line(model: nn.Module, batches: Any, options: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        syncnorm.advise(model, batches, **options)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- over ranks


def over_ranks(splits: list[list[Tensor]]) -> str:
    mine = splits[dist.get_rank()]
    return str(syncnorm.advise(mlp(16), mine, ranks=8, ranks_per_node=8))


@pytest.mark.gloo
def test_ranks_with_different_numbers_of_batches_are_one() -> None:
    parts = list(digits()[0].split(3)[:20])
    first = run_ranks(over_ranks, 3, [parts[:12], [], parts[12:]])
    assert first[0] == first[1] == first[2]
    rows = first[0].splitlines()
    # The statistics that layers are lent are those of a rank's first batches, so that only the first layer is the same to
    # the digit; the others see inputs scaled a little otherwise.
    alone = str(syncnorm.advise(mlp(16), parts, ranks=8, ranks_per_node=8)).splitlines()
    assert rows[0] == alone[0] and rows[2] == alone[2]


def pyramid_over_ranks(splits: list[list[Tensor]]) -> str:
    return str(syncnorm.advise(Pyramid(), splits[dist.get_rank()], ranks=8, ranks_per_node=8))


@pytest.mark.gloo
def test_ranks_may_have_seen_different_turns() -> None:
    parts = [torch.randn(n, 6, dtype=torch.float64) for n in (4, 4, 3, 5)]
    alone = str(syncnorm.advise(Pyramid(), parts, ranks=8, ranks_per_node=8))
    assert run_ranks(pyramid_over_ranks, 3, [parts[:2], parts[2:], []]) == [alone] * 3


def costs(widths: list[int], check: str) -> tuple[tuple[int, int], tuple[int, int], str]:
    syncnorm.set_check(check)
    torch.manual_seed(0)
    net = nn.Sequential(*chain(*([nn.Linear(a, b), nn.BatchNorm1d(b)] for a, b in pairwise([64, *widths]))))
    x = torch.randn(40, 64)
    advice = syncnorm.advise(net, x.split(2))
    for command in advice.commands():
        eval(command, {"syncnorm": syncnorm, "model": net})
    for _ in range(2):  # in the first step rows find their width
        with ExchangeMeter() as meter:
            net(x[:2]).square().sum().backward()
    after = syncnorm.advise(net, x.split(2))
    assert (after.exchanges, after.num_bytes) == (advice.exchanges, advice.num_bytes)
    return (advice.exchanges, advice.num_bytes), (meter.exchanges, meter.num_bytes), advice.rows[0].action


@pytest.mark.gloo
@pytest.mark.parametrize("check", ["inline", "off"])
@pytest.mark.parametrize("widths", [[8, 3], [200, 8], [2200, 16]], ids=str)
def test_cost_is_what_a_step_then_sends(widths: list[int], check: str) -> None:
    for told, measured, action in run_ranks(costs, 2, widths, check):
        assert action == "synchronise (world)"
        assert told == measured


def ghost_cost() -> tuple[tuple[int, int], tuple[int, int]]:
    layer = syncnorm.GhostBatchNorm1d(4, 8)
    x = torch.randn(160, 4)
    for _ in range(3):  # the first agrees on ghosts
        with ExchangeMeter() as meter:
            layer(x[:16]).sum().backward()
    advice = syncnorm.advise(layer, x.split(16))
    assert advice.ok
    return (advice.exchanges, advice.num_bytes), (meter.exchanges, meter.num_bytes)


@pytest.mark.gloo
def test_cost_of_ghosts_that_stay() -> None:
    for told, measured in run_ranks(ghost_cost, 2):
        assert told == measured


def one_fails() -> str:
    batches = iter([torch.randn(2, 64), None if dist.get_rank() else torch.randn(2, 64)])
    try:
        syncnorm.advise(mlp(8), batches)
    except (TypeError, SyncNormMismatch) as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.gloo
def test_a_rank_that_fails_does_not_leave_the_others_waiting() -> None:
    try:
        assert run_ranks(one_fails, 2, group_timeout=5) == ["SyncNormMismatch", "TypeError"]
    except RankError as error:
        raise AssertionError(error) from None
