"""Tier: gpu. What a probe reads of a model on a device, and what advise makes of it, is what they do on the CPU."""

import copy

import pytest
import torch
from torch import nn

import syncnorm

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from syncnorm.diagnostics import EffectiveBatch, NormProbe, TrainEvalGap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def test_readings_and_metrics_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), syncnorm.BatchRenorm2d(8)).double()
    there, x = copy.deepcopy(here).cuda(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    readings = []
    for model, batch in ((here, x), (there, x.cuda())):
        probe = NormProbe(model, per_sample=True)
        with probe:
            model(batch).square().sum().backward()
        readings.append(probe.reading)
    for mine, theirs in zip(readings[0][:5], readings[1][:5], strict=True):  # the last are seconds
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for kind in (EffectiveBatch, TrainEvalGap):
        metric = kind(there).cuda()
        metric.update(readings[1])
        assert metric.rows.is_cuda and all(value.is_cuda for value in metric.compute().values())


def test_advice_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)
    ).double()
    batches = torch.randn(64, 16, dtype=torch.float64).split(2)
    expected = [row.action for row in syncnorm.advise(model, batches).rows]
    assert [row.action for row in syncnorm.advise(model.cuda(), batches).rows] == expected
