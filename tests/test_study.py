"""Tier: gloo ranks. The study in small: its gates hold, it resumes, and its document is of its results."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm import modules

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "configs/study-small.yaml"
SECONDS = 280  # of which 25 are needed on one core


@pytest.fixture(scope="module", autouse=True)
def parts() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import study_parts.experiments
    import study_parts.gates
    import study_parts.report

    yield study_parts
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the small study."""
    folder = tmp_path_factory.mktemp("study")
    words = [sys.executable, str(ROOT / "scripts/study.py"), "run", "--config", str(SMALL), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.gloo
@pytest.mark.slow
def test_the_gates_hold_in_small(small: Path, parts: Any) -> None:
    gates = parts.gates.check(parts.results.Results(small))
    assert {gate.experiment for gate in gates} == {path.stem for path in small.glob("*.csv")}
    assert not [gate for gate in gates if not gate.holds]
    assert sum(gate.experiment == "batch_mlp" for gate in gates) == 7


@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.gloo
@pytest.mark.slow
def test_a_finished_cell_is_not_run_again_and_a_changed_one_is(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import study

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # this process is not the study's
    before = {path: path.read_bytes() for path in small.glob("*.csv")}
    assert study.main(["run", "--config", str(SMALL), "--out", str(small)]) == 0
    assert " 0 to run" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in small.glob("*.csv")} == before
    changed = tmp_path / "changed.yaml"
    for scaling in ("raw", "min-max"):
        spec = f"{{run: classify_table, cells: [{{table: wine, scaling: {scaling}}}]}}"
        changed.write_text(f"seeds: 2\nexperiments: {{tables: {spec}}}")
        assert study.main(["run", "--config", str(changed), "--out", str(tmp_path)]) == 0
        rows = (tmp_path / "tables.csv").read_text().splitlines()
        assert len(rows) == 3 and all(scaling in row for row in rows[1:])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a mapping"),
        ("seeds: 0\nexperiments: {}", "'seeds', a number of at least 1"),
        ("seeds: 1\nexperiments: {a: {cells: []}}", "'a' needs 'run'"),
        ("seeds: 1\nexperiments: {a: {run: nothing}}", "no function 'nothing'"),
        ("seeds: [1", "while parsing"),
        ("seeds: 1\nseeds: 2", "is there twice"),
    ],
)
def test_a_bad_configuration_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    import study

    config = tmp_path / "bad.yaml"
    config.write_text(text)
    assert study.main(["run", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import study

    assert study.main(["run", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert study.main(["run", "--only", "nothing", "--out", str(tmp_path)]) == 2
    assert "no experiment 'nothing' in the configuration; it has batch_mlp" in capsys.readouterr().err
    document = tmp_path / "study.md"
    assert study.main(["report", "--out", str(tmp_path), "--document", str(document)]) == 2
    assert "python scripts/study.py run" in capsys.readouterr().err
    assert not document.exists()


def test_figures_are_drawn_of_what_is_there(parts: Any, tmp_path: Path) -> None:
    from study_parts import figures

    names = figures.draw(parts.results.Results(ROOT / "docs/study"), tmp_path)
    assert names == list(figures.FIGURES)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)
    assert figures.draw(parts.results.Results(tmp_path), tmp_path) == []


def test_the_document_is_of_the_committed_results(parts: Any) -> None:
    results = parts.results.Results(ROOT / "docs/study")
    written = parts.report.render(parts.report.TEMPLATE.read_text(), results)
    assert written == (ROOT / "docs/study.md").read_text(), "run: python scripts/study.py report"
    assert "[[" not in written
    assert all(gate.holds for gate in parts.gates.check(results))
    images = [line.split("](")[1].split(")")[0] for line in written.splitlines() if line.startswith("![")]
    assert images and all((ROOT / "docs" / image).is_file() for image in images)


def test_every_cell_of_the_configuration_has_been_run(parts: Any) -> None:
    from syncnorm.lightning._config import load_config

    cells = parts.store.cells(load_config((ROOT / "configs/study.yaml").read_text()))
    done = {key for name in {c.experiment for c in cells} for key in parts.store.finished(ROOT / "docs/study", name)}
    assert {cell.key for cell in cells} == done


def compared(one: nn.Module, other: nn.Module, shape: tuple[int, ...], scale: torch.Tensor) -> None:
    """Both in training for three steps, with different values of weight and bias, then in evaluation."""
    torch.manual_seed(0)
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) * scale + step
        a, b = (x.clone().requires_grad_() for _ in range(2))
        dy = torch.randn(shape, dtype=torch.float64)
        ya, yb = one(a), other(b)
        torch.testing.assert_close(ya, yb, rtol=1e-9, atol=1e-9)
        ya.backward(dy)
        yb.backward(dy)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 2)])
def test_a_rank_for_itself_is_a_ghost(parts: Any, shape: tuple[int, ...]) -> None:
    kind = "2d" if len(shape) == 4 else "1d"
    make = getattr(modules, f"SyncBatchNorm{kind}")
    ranks = parts.layers.PerRank(lambda c, affine: make(c, affine=affine), 5, 3).double()
    ghost = getattr(modules, f"GhostBatchNorm{kind}")(5, 4).double()
    for module in (ranks.affine, ghost):
        with torch.no_grad():
            module.weight.copy_(torch.arange(1.0, 6))
            module.bias.copy_(torch.arange(5.0))
    compared(ranks, ghost, shape, torch.tensor(2.0))


class Switchables(nn.Module):
    """The package's layer on each of three ranks for itself, with shared parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules.SwitchableNorm2d(5) for _ in range(3))
        for name, parameter in self.each[0].named_parameters():
            for other in self.each[1:]:
                other._parameters[name] = parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return torch.cat([layer(part) for layer, part in zip(self.each, x.chunk(3), strict=True)])
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(layer, name) for layer in self.each]).mean(0)
            getattr(self.each[0], name).copy_(mean)
        return self.each[0](x)


def test_the_switchable_norm_of_the_study_is_the_package_s(parts: Any) -> None:
    ours, theirs = parts.layers.PerRankSwitchable(1, 5, 3).double(), Switchables().double()
    with torch.no_grad():
        for name in ("mean_logits", "var_logits"):
            values = torch.tensor([0.3, -1.0, 0.8])
            getattr(ours, name).copy_(values.view(3, 1, 1))
            getattr(theirs.each[0], name).copy_(values)
    compared(ours, theirs, (12, 5, 3, 2), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("model", "method", "batch"),
    [
        ("mlp", "BN", 4),
        ("mlp", "MABN", 8),
        ("mlp", "DynamicTanh", 32),
        ("resnet_stride2", "GroupNorm+WS", 32),
        ("resnet_stride2", "FilterResponseNorm", 32),
        ("resnet_stride2", "SwitchableNorm", 8),
        ("vit", "LayerNorm", 32),
        ("vit", "BatchRenorm", 4),
    ],
)
def test_seeds_do_not_meet(parts: Any, model: str, method: str, batch: int) -> None:
    """Two steps of one seed are the same, whichever seeds are beside it; but for rounding."""
    from study_parts import supervised, training

    images, labels, _, _ = parts.data.digits()
    found = []
    for seeds in ([1], [0, 1, 2]):
        net, shape = supervised.build(model, seeds, method, batch)
        net.double()
        order = parts.data.orders(len(images), seeds, 1)[:2]
        steps = supervised.batches(images.double(), labels, order, shape, by_label=False)
        training.fit(net, steps, 2, lr=0.01)
        logits = training.by_seed(
            net.eval()(training.tiled(images[:5].double().view(-1, *shape), len(seeds))), len(seeds)
        )
        found.append(logits[:, seeds.index(1)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_scenes_of_training_and_test_share_no_pixel(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    position = torch.arange(512.0).expand(3, 512, 512)  # each pixel tells its column
    monkeypatch.setattr(parts.data, "textures", lambda: position)
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.5))  # exposure as it is
    columns = [set(parts.data.scenes(100, draw, test=test)[0].unique().tolist()) for test in (False, True)]
    assert columns[0] and columns[1] and not columns[0] & columns[1]


def test_recalibration_is_the_package_s(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(syncnorm, "recalibrate", lambda *args, **kwargs: called.append(args))
    rows = parts.supervised.lagging_statistics([0], momentum=0.1, step=1)
    assert called and rows[0]["error_average"] == rows[0]["error_recalibrated"]
