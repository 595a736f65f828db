"""Tier: gloo ranks. verify says equal where it is, names the layer where it is not, and tells what it could not compare."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.diagnostics._measure import Measured
from syncnorm.diagnostics._verify import _splits
from syncnorm.diagnostics._verify_report import compare

pytestmark = pytest.mark.gloo


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.Linear(125, 4),
        nn.BatchNorm1d(4, affine=False),
    )


class Own(nn.BatchNorm1d):
    """Left by convert: it might do more."""


def net_with_a_layer_that_is_left() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), Own(3))


IMAGES = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_a_converted_model_equals_one_process() -> None:
    report = syncnorm.verify(net, IMAGES, ranks=3)
    assert report, report
    assert report.ok
    assert report.splits == (3, 3, 2)
    assert {row.kind for row in report.rows} == {
        "layer output", "output", "input gradient", "parameter gradient", "buffer",
    }  # fmt: skip
    names = [row.name for row in report.rows if row.kind == "layer output"]
    assert names == [str(number) for number in range(9)]
    assert len([row for row in report.rows if row.kind == "parameter gradient"]) == 10
    assert len([row for row in report.rows if row.kind == "buffer"]) == 9
    assert max(row.error for row in report.rows) < 1e-12
    assert report.notes == ("random layers put in evaluation mode: 3",)
    text = str(report).splitlines()
    assert text[0] == "3 ranks of [3, 3, 2] samples equal one process of 8 (float64, tolerance 1e-10)"
    assert text[1].split() == ["what", "compared", "differ", "largest", "error", "in"]
    assert text[-1] == "note: random layers put in evaluation mode: 3"


def test_the_first_layer_that_differs_is_named_with_its_reason() -> None:
    report = syncnorm.verify(net_with_a_layer_that_is_left, torch.randn(6, 5), ranks=2)
    assert not report
    assert (report.worst.kind, report.worst.name) == ("layer output", "3")
    assert report.worst.error > 1e-3
    text = str(report)
    assert "2 ranks of [4, 2] samples DO NOT EQUAL one process of 6" in text
    assert "first layer that differs: 3, error " in text
    assert "(Own, skip: Own may do more than batch norm" in text
    assert "note: 3 was left: Own may do more" in text
    passed = {row.name: row.ok for row in report.rows if row.kind == "layer output"}
    assert passed == {"0": True, "1": True, "2": True, "3": False}


def test_an_excluded_layer_is_found_in_the_middle() -> None:
    report = syncnorm.verify(net(), IMAGES, exclude="5")
    assert report.worst.name == "5"
    assert "(BatchNorm2d, keep: excluded by '5')" in str(report)


def test_a_rank_without_samples_and_float32() -> None:
    model = net()
    report = syncnorm.verify(model, IMAGES, splits=[8, 0], dtype=torch.float32, backend="reference")
    assert report, report
    assert (report.splits, report.dtype, report.tolerance) == ((8, 0), "float32", 1e-3)
    assert type(model[1]) is nn.BatchNorm2d
    assert not any(parameter.is_shared() for parameter in model.parameters())
    assert not syncnorm.verify(model, IMAGES, splits=[5, 3], dtype=torch.float32, tolerance=1e-12)


class TwoArguments(nn.Module):
    """A tensor and a mask in; a dict with a tuple, a mean over the batch and a constant out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, *, mask: Tensor, scale: float, table: Tensor) -> dict[str, Any]:
        y = self.norm(x) * mask.unsqueeze(1) * scale + table.sum()
        y = self.norm(y)
        return {"pair": (y, y.sum(1)), "loss": y.mean(), "table": table, "none": None}


class SumOfALayerNorm(nn.Module):
    """The same for every input but for rounding; with ``wrong``, other in each rank."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.linear, self.norm, self.last = (
            nn.Linear(5, 6),
            nn.BatchNorm1d(6),
            nn.LayerNorm(6, elementwise_affine=False),
        )
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.norm(self.linear(x))).sum(1)
        return y + 1e-6 * x.sum(1) * len(x) if self.wrong else y


def net_of_three_norms() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)
    )


def test_what_is_zero_but_for_rounding_is_no_difference_and_is_said() -> None:
    torch.manual_seed(0)  # a mean of 250 standard deviations loses 1e-11 between ranks, which is more than rounding
    report = syncnorm.verify(SumOfALayerNorm(), torch.randn(6, 5))
    assert report, report
    rounding = {row.name for row in report.rows if row.rounding}
    assert "input" in rounding and all(row.ok and row.error > 1e-10 for row in report.rows if row.rounding)
    assert report.notes[0].startswith(
        "nothing but rounding, as the last bits of parameters and input move them as much: "
    )
    # two samples: a norm turns both into ±1, and its input gradient is what eps leaves of it, three times
    report = syncnorm.verify(net_of_three_norms, torch.randn(2, 5) * 30)
    assert report, report


def test_a_small_error_is_no_rounding() -> None:
    report = syncnorm.verify(SumOfALayerNorm(wrong=True), torch.randn(6, 5))
    assert not report
    assert {row.name for row in report.rows if not row.ok} >= {"output", "input"}
    report = syncnorm.verify(SumOfALayerNorm(), torch.randn(6, 5), tolerance=1e-10)
    assert not report, "a tolerance that is given is kept to"


def test_dicts_in_and_out() -> None:
    inputs = {"x": torch.randn(7, 4), "mask": torch.arange(7) % 3 == 0, "scale": 2.0, "table": torch.ones(2)}
    report = syncnorm.verify(TwoArguments, inputs, ranks=2)
    assert report, report
    names = {kind: [row.name for row in report.rows if row.kind == kind] for kind in ("output", "input gradient")}
    assert names == {"output": ["pair.0", "pair.1"], "input gradient": ["x"]}
    assert [row.name for row in report.rows if row.kind == "layer output"] == ["norm", "norm (call 2)"]
    assert report.notes == ("2 outputs without the batch in dim 0 were not compared",)


def test_a_hugging_face_resnet() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    inputs = {
        "pixel_values": torch.randn(4, 3, 24, 24),
        "labels": torch.tensor([0, 1, 2, 0]),
        "output_hidden_states": True,
    }
    report = syncnorm.verify(model, inputs, ranks=2)
    assert report, report
    assert "logits" in [row.name for row in report.rows if row.kind == "output"]
    assert "the model came in evaluation mode and was put in training mode" in report.notes
    assert not model.training


def test_a_norm_without_the_batch_needs_no_ranks() -> None:
    assert syncnorm.verify(net, IMAGES, to="layer_norm", exclude="8") is not None
    report = syncnorm.verify(net, IMAGES, to="layer_norm")
    assert report, report
    assert "buffer" not in {row.kind for row in report.rows}


def test_lambdas_are_fine_where_the_model_can_be_sent() -> None:
    assert syncnorm.verify(lambda: nn.Sequential(nn.BatchNorm1d(3)), torch.randn(4, 3))


# What cannot be verified


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.rand_like(x))


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).square().mean(0)


def test_a_model_that_draws_random_numbers() -> None:
    with pytest.raises(ValueError, match=r"two runs of the model on the same input differ in \['output'\]"):
        syncnorm.verify(Noisy, torch.randn(4, 3))


def test_a_model_without_the_batch_in_its_output() -> None:
    # Three features and three samples: the size alone does not tell.
    with pytest.raises(ValueError, match="no floating-point output of the model has its 3 samples in dim 0 to compare"):
        syncnorm.verify(Summed, torch.randn(3, 3))


def test_a_model_that_fails_says_where() -> None:
    with pytest.raises(syncnorm.testing.RankError, match="shapes cannot be multiplied"):
        syncnorm.verify(net_with_a_layer_that_is_left, torch.randn(4, 7))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ranks": 9}, ValueError, r"the input has 8 samples in dim 0, fewer than 9 ranks"),
        ({"ranks": 1}, ValueError, r"ranks must be at least 2, got 1"),
        ({"splits": [4, 3]}, ValueError, r"splits must be 2 numbers of samples, 8 in all, got \[4, 3\]"),
        ({"dtype": torch.float16}, ValueError, r"dtype must be torch.float64 or torch.float32, got torch.float16"),
        ({"to": "batch"}, ValueError, r"to must be one of"),
        ({"include": "nothing"}, ValueError, r"include='nothing' matches no normalisation layer"),
        ({"input": {"n": 3}}, TypeError, r"input must hold a tensor with its samples in dim 0, got dict without one"),
        ({"accumulate": 2}, ValueError, r"verify makes one step, and accumulate=2 moves running statistics once in 2"),
        ({"make_model": nn.Linear(2, 2)}, ValueError, r"convert would change no layer of this model"),
        ({"make_model": dict}, TypeError, r"make_model must be an nn.Module or a function that makes one, got dict"),
        (
            {"include": lambda name, module: True},
            ValueError,
            r"cannot be sent to another process.*Give include and exclude",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        syncnorm.verify(**{"make_model": net, "input": IMAGES, **arguments})


def test_what_cannot_be_sent() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

    with pytest.raises(ValueError, match=r"make_model cannot be sent to another process: .* Give a function"):
        syncnorm.verify(Local, torch.randn(4, 3))


@pytest.mark.slow
def test_a_script_that_starts_itself_again(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import torch, syncnorm\n"
        "def make(): return torch.nn.Sequential(torch.nn.BatchNorm1d(3))\n"
        "syncnorm.verify(make, torch.randn(4, 3))\n"
    )
    root = str(Path(syncnorm.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 1
    assert 'A script must call verify below `if __name__ == "__main__":`' in done.stderr


# The comparison itself, without ranks


@pytest.mark.parametrize(
    ("batch", "ranks", "splits"),
    [(8, 3, (3, 3, 2)), (8, 2, (5, 3)), (4, 4, (1, 1, 1, 1)), (6, 3, (3, 2, 1)), (5, 2, (3, 2))],
)
def test_splits_are_uneven_where_the_batch_allows(batch: int, ranks: int, splits: tuple[int, ...]) -> None:
    assert _splits(batch, ranks, None) == splits


def measured(**changes: Any) -> Measured:
    whole = Measured(
        outputs={"output": torch.arange(6.0).view(3, 2)},
        input_grads={"input": torch.ones(3, 2)},
        param_grads={"w": torch.tensor([2.0, 4.0]), "unused": None},
        buffers={"n": torch.tensor(1), "mean": torch.ones(2)},
        layers=[("a", torch.arange(6.0).view(3, 2))],
    )
    return dataclasses.replace(whole, **changes)


def parts() -> list[Measured]:
    whole = measured()
    return [
        measured(
            outputs={"output": whole.outputs["output"][rows]},
            input_grads={"input": torch.ones(3, 2)[rows]},
            param_grads={"w": torch.tensor([1.0, 2.0]), "unused": None},
            layers=[("a", whole.layers[0][1][rows])],
        )
        for rows in (slice(0, 2), slice(2, 3))
    ]


@pytest.mark.parametrize(
    ("rank", "change", "row"),
    [
        (1, {}, None),
        (1, {"outputs": {"output": torch.tensor([[4.0, 5.5]])}}, ("output", "output", 0.1)),
        (0, {"param_grads": {"w": torch.tensor([1.0, 2.4]), "unused": None}}, ("parameter gradient", "w", 0.1)),
        (
            0,
            {"param_grads": {"w": torch.tensor([1.0, 2.0]), "unused": torch.ones(1)}},
            ("parameter gradient", "unused", math.inf),
        ),
        (1, {"buffers": {"n": torch.tensor(2), "mean": torch.ones(2)}}, ("buffer", "n", math.inf)),
        (1, {"buffers": {"n": torch.tensor(1), "mean": torch.tensor([1.0, math.nan])}}, ("buffer", "mean", math.inf)),
        (0, {"buffers": {"n": torch.tensor(1)}}, ("buffer", "mean", math.inf)),
        (0, {"layers": [("a", torch.tensor([[0.0, 1.0], [2.0, 2.5]]))]}, ("layer output", "a", 0.1)),
        (0, {"input_grads": {"input": None}}, ("input gradient", "input", math.inf)),
    ],
)
def test_one_wrong_value_on_one_rank_is_found(rank: int, change: dict[str, Any], row: Any) -> None:
    found = parts()
    found[rank] = dataclasses.replace(found[rank], **change)
    wrong = [(r.kind, r.name, pytest.approx(r.error)) for r in compare(measured(), found, 1e-10) if not r.ok]
    assert wrong == ([] if row is None else [row])


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_what_a_mask_fills_in_is_no_difference_and_hides_none(fill: float) -> None:
    whole = measured(outputs={"output": torch.tensor([[1.0, fill], [1.0, 1.0], [fill, 1.0]])})
    found = [
        dataclasses.replace(p, outputs={"output": whole.outputs["output"][n]})
        for p, n in zip(parts(), ([0, 1], [2]), strict=True)
    ]
    assert all(row.ok for row in compare(whole, found, 1e-10))
    found[0].outputs["output"] = torch.tensor([[1.0, fill], [1.0, 1.5]])
    assert [(r.name, r.error) for r in compare(whole, found, 1e-10) if not r.ok] == [("output", 0.5)]
    found[0].outputs["output"] = torch.tensor([[fill, fill], [1.0, 1.0]])
    assert [r.name for r in compare(whole, found, 1e-10) if not r.ok] == ["output"]


def test_rounding_in_a_gradient_that_is_zero_is_not_an_error() -> None:
    """The bias of a convolution in front of a batch norm has gradient 0 and comes out as 1e-17."""
    whole = measured(param_grads={"w": torch.tensor([2.0, 4.0]), "bias": torch.tensor([1e-17])})
    found = [
        dataclasses.replace(p, param_grads={"w": p.param_grads["w"], "bias": torch.tensor([-3e-17])}) for p in parts()
    ]
    assert all(row.ok for row in compare(whole, found, 1e-10))
