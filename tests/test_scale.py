"""Tier: no process. What scripts/scale.py counts and predicts: as many bytes for a thousand ranks as for two."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm


@pytest.fixture(scope="module")
def scale() -> Any:
    path = Path(__file__).resolve().parent.parent / "scripts" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 300, 1), nn.BatchNorm1d(300), nn.Flatten()
    )


X = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["off", "inline"])
def check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from syncnorm.distributed import ledger

    monkeypatch.setattr(ledger, "_level", request.param)
    return str(request.param)


def test_bytes_of_a_rank_do_not_grow_with_the_ranks(scale: Any, check: str) -> None:
    model = syncnorm.convert(small())
    counted = {ranks: scale.count(model, X, ranks) for ranks in (2, 64, 1024)}
    assert counted[2] == counted[64] == counted[1024]
    assert not any(exchange.gather for exchange in counted[2])
    if check == "off":  # forward 2C + 2 words, backward 2C, the last layer's backward first: docs/distributed.md
        assert [exchange.payload // 8 for exchange in counted[2]] == [12, 602, 600, 10]
    sent = {ranks: sum(exchange.sent(ranks) for exchange in exchanges) for ranks, exchanges in counted.items()}
    assert sent[1024] < 2 * sum(exchange.payload for exchange in counted[2])
    assert not dist.is_initialized()


def test_a_gather_is_seen_to_grow(scale: Any) -> None:
    def gathering(x: torch.Tensor) -> torch.Tensor:
        dist.all_gather([torch.empty(7) for _ in range(dist.get_world_size())], torch.ones(7))
        return (x * torch.ones(1, requires_grad=True)).sum()

    gathering.zero_grad = lambda: None  # type: ignore[attr-defined]
    sent = {ranks: sum(e.sent(ranks) for e in scale.count(gathering, X, ranks)) for ranks in (2, 1024)}
    assert sent == {2: 28, 1024: 1023 * 28}


def test_the_prediction_is_its_formula(scale: Any) -> None:
    exchanges = [scale.Exchange(False, 4096), scale.Exchange(False, 8)]
    # Eight ranks: three rounds of 10 µs for each exchange, and 2·7/8 of its bytes at 1 GB/s.
    assert scale.predict(exchanges, 8, 1e-5, 1e9) == pytest.approx(6e-5 + 1.75 * 4104e-9, rel=1e-12)
    assert scale.predict(exchanges, 9, 1e-5, 1e9) > 8e-5  # a fourth round


def test_the_table(
    scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--latency-us", "10", "--bandwidth-gb", "1", "--step-ms", "5", "--json", str(tmp_path / "out.json")]
    model = ["--model", f"{small.__module__}:small", "--input", "3,2,8"]
    monkeypatch.setattr(sys, "argv", ["scale.py", *model, "--ranks", "2", "1024", *given])
    scale.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "latency 10 µs, bandwidth 1.00 GB/s, given"
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [2, 1024] and rows[0]["exchanges"] == rows[1]["exchanges"] == 4
    assert rows[0]["bytes"] == rows[1]["bytes"]
    assert printed[-1].startswith(f"| 1,024 | 4 | {rows[1]['bytes']:,} |")
    assert f"| {rows[1]['seconds'] * 1e3:.2f} | {rows[1]['seconds'] / 5e-3 * 100:.1f} % |" in printed[-1]
    monkeypatch.setattr(sys, "argv", ["scale.py", "--ranks", "1"])
    with pytest.raises(SystemExit):
        scale.main()


def test_the_default_is_a_resnet50(scale: Any) -> None:
    norms = [module.num_features for module in scale.resnet50().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 53 and sum(norms) == 26_560  # torchvision's: 53,120 parameters in its batch norms
