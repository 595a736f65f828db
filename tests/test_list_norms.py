"""Tier: no process. The catalogue is true: what it names exists, and what it says about conversion works."""

from typing import get_args

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm import modules
from syncnorm.conversion import To


def test_every_name_exists_and_the_table_prints() -> None:
    norms = syncnorm.list_norms()
    assert len(norms) >= 12
    text = str(norms)
    for info in norms:
        for name in info.names:
            base, _, dims = name.partition("1d/")
            for variant in [f"{base}{d}d" for d in (1, 2, 3)] if dims else [base]:
                assert hasattr(modules, variant), variant
            assert name in text


@pytest.mark.filterwarnings("ignore:.*is a norm and an activation in one", "ignore:.*does not divide")
def test_targets_of_conversion_are_accepted() -> None:
    for info in syncnorm.list_norms():
        if info.convert:
            options = {"ghost_batch_norm": {"virtual_batch_size": 2}, "group_norm": {"num_groups": 2}}.get(
                info.convert, {}
            )
            model = syncnorm.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), to=info.convert, **options)
            family = "GroupNorm" if info.convert == "layer_norm" else info.names[0].removesuffix("1d/2d/3d")
            assert type(model[1]).__name__.startswith(family), info
            x = torch.randn(4, 3, 5, 5)
            same = [model.train(training)(x) for training in (True, False)]
            if info.same_in_eval:
                assert torch.equal(*same), info
            else:
                assert not torch.allclose(*same), info


def test_every_target_of_conversion_is_some_norms() -> None:
    assert {info.convert for info in syncnorm.list_norms() if info.convert} == set(get_args(To))
