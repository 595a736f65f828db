"""Every method of the catalogue, once: how it is made, what it takes, and what it does not claim.

``test_catalogue.py`` runs its checks over this list, and fails if a public layer is neither here nor in ``ELSEWHERE``. To
cover a new method, add a line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from syncnorm import modules


@dataclass(frozen=True)
class Method:
    """A layer and the claims that it does not make.

    Attributes:
        name: As exported by ``syncnorm.modules``; for a variant, with a remark in brackets.
        make: A new layer.
        shape: Of its input, N first.
        more: Shapes of further inputs (a condition, a style), N first.
        train_is_eval: Whether training and evaluation are the same function.
        maps: Whether the dims from the third on are space: may be 1×1, and laid out channels_last.
        pickles: Whether the whole module pickles; torch refuses it for parametrized ones.
        half_parameters: Whether half inputs need parameters in half, as convolutions do.
        keeps_layout: Whether the output is laid out as the input; not where torch's own operator
            chooses (batch norm of sequences, convolutions of 1 and 3 dims).
        follows_weights: Whether its buffers move with the weights, samples or not.
        variant: The code of another entry on another number of dims; compiled and exported there already.
        constants: What its training takes for constant, so that the gradient is by design not the derivative.
        faults: Patterns of tests that fail, and why: expected to fail until this entry goes.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    more: tuple[tuple[int, ...], ...] = ()
    train_is_eval: bool = True
    maps: bool = True
    pickles: bool = True
    half_parameters: bool = False
    keeps_layout: bool = True
    follows_weights: bool = False
    variant: bool = False
    constants: str = ""
    faults: Mapping[str, str] = field(default_factory=dict)


IMAGE = (3, 6, 5, 4)


def _fitted(module: Any) -> nn.Module:
    module.fit([torch.randn(20, 6, dtype=torch.float64) * 2 + 1])
    return module


METHODS = [
    # statistics of the batch
    Method("SyncBatchNorm", lambda: modules.SyncBatchNorm(6), (3, 6), train_is_eval=False, maps=False),
    Method(
        "SyncBatchNorm1d",
        lambda: modules.SyncBatchNorm1d(6),
        (3, 6, 5),
        train_is_eval=False,
        keeps_layout=False,
        variant=True,
    ),
    Method("SyncBatchNorm2d", lambda: modules.SyncBatchNorm2d(6), IMAGE, train_is_eval=False),
    Method("SyncBatchNorm3d", lambda: modules.SyncBatchNorm3d(6), (3, 6, 2, 3, 2), train_is_eval=False, variant=True),
    Method(
        "BatchRenorm1d",
        lambda: modules.BatchRenorm1d(6),
        (3, 6, 5),
        train_is_eval=False,
        maps=False,
        variant=True,
    ),
    Method("BatchRenorm2d", lambda: modules.BatchRenorm2d(6), IMAGE, train_is_eval=False, constants="r and d"),
    Method(
        "BatchRenorm3d",
        lambda: modules.BatchRenorm3d(6),
        (3, 6, 2, 3, 2),
        train_is_eval=False,
        variant=True,
    ),
    Method(
        "GhostBatchNorm1d",
        lambda: modules.GhostBatchNorm1d(6, virtual_batch_size=2),
        (4, 6, 5),
        train_is_eval=False,
        variant=True,
        keeps_layout=False,
    ),
    Method(
        "GhostBatchNorm2d", lambda: modules.GhostBatchNorm2d(6, virtual_batch_size=2), (5, 6, 5, 4), train_is_eval=False
    ),
    Method(
        "GhostBatchNorm3d",
        lambda: modules.GhostBatchNorm3d(6, virtual_batch_size=2),
        (4, 6, 2, 3, 2),
        train_is_eval=False,
        variant=True,
    ),
    Method(
        "MovingAverageBatchNorm1d",
        lambda: modules.MovingAverageBatchNorm1d(6),
        (3, 6, 5),
        train_is_eval=False,
        maps=False,
        variant=True,
    ),
    Method(
        "MovingAverageBatchNorm2d",
        lambda: modules.MovingAverageBatchNorm2d(6),
        IMAGE,
        train_is_eval=False,
        constants="what earlier batches gave, and r,",
    ),
    Method(
        "MovingAverageBatchNorm3d",
        lambda: modules.MovingAverageBatchNorm3d(6),
        (3, 6, 2, 3, 2),
        train_is_eval=False,
        variant=True,
    ),
    Method("FrozenBatchNorm1d", lambda: modules.FrozenBatchNorm1d(6), (3, 6, 5), variant=True, keeps_layout=False),
    Method("FrozenBatchNorm2d", lambda: modules.FrozenBatchNorm2d(6), IMAGE),
    Method("FrozenBatchNorm3d", lambda: modules.FrozenBatchNorm3d(6), (3, 6, 2, 3, 2), variant=True),
    # statistics of a sample
    Method("GroupNorm", lambda: modules.GroupNorm(6, 3), IMAGE),
    Method("GroupNorm (vectors)", lambda: modules.GroupNorm(6, 2), (3, 6), maps=False),
    Method("GroupNorm (volumes)", lambda: modules.GroupNorm(6, 2), (3, 6, 2, 3, 2), variant=True),
    Method("LayerNorm", lambda: modules.LayerNorm(6), (3, 5, 6), maps=False),
    Method("LayerNorm (channels)", lambda: modules.LayerNorm(6, channel_dim=1), IMAGE),
    Method("RMSNorm", lambda: modules.RMSNorm(6), (3, 5, 6), maps=False),
    Method("RMSNorm (partial)", lambda: modules.RMSNorm(6, p=0.5), (3, 5, 6), maps=False),
    Method("RMSNorm (channels)", lambda: modules.RMSNorm(6, channel_dim=1), IMAGE),
    Method("InstanceNorm1d", lambda: modules.InstanceNorm1d(6, affine=True), (3, 6, 5), variant=True),
    Method("InstanceNorm2d", lambda: modules.InstanceNorm2d(6, affine=True), IMAGE),
    Method("InstanceNorm3d", lambda: modules.InstanceNorm3d(6, affine=True), (3, 6, 2, 3, 2), variant=True),
    Method("FilterResponseNorm", lambda: modules.FilterResponseNorm(6), IMAGE),
    Method("FilterResponseNorm (learnable eps)", lambda: modules.FilterResponseNorm(6, learnable_eps=True), IMAGE),
    Method("FilterResponseNorm (TLU inside)", lambda: modules.FilterResponseNorm(6, tlu=True), IMAGE),
    Method("TLU", lambda: modules.TLU(6), IMAGE),
    Method("EvoNormS0", lambda: modules.EvoNormS0(6, 3), IMAGE),
    # the batch and the sample, mixed
    Method("SwitchableNorm1d", lambda: modules.SwitchableNorm1d(6), (3, 6, 5), train_is_eval=False),
    Method("SwitchableNorm1d (vectors)", lambda: modules.SwitchableNorm1d(6), (3, 6), train_is_eval=False, maps=False),
    Method("SwitchableNorm2d", lambda: modules.SwitchableNorm2d(6), IMAGE, train_is_eval=False),
    Method("SwitchableNorm2d (no batch)", lambda: modules.SwitchableNorm2d(6, using_bn=False), IMAGE),
    Method("SwitchableNorm3d", lambda: modules.SwitchableNorm3d(6), (3, 6, 2, 3, 2), train_is_eval=False),
    Method("BatchInstanceNorm1d", lambda: modules.BatchInstanceNorm1d(6), (3, 6, 5), train_is_eval=False),
    Method("BatchInstanceNorm2d", lambda: modules.BatchInstanceNorm2d(6), IMAGE, train_is_eval=False),
    Method("BatchInstanceNorm3d", lambda: modules.BatchInstanceNorm3d(6), (3, 6, 2, 3, 2), train_is_eval=False),
    Method("EvoNormB0", lambda: modules.EvoNormB0(6), IMAGE, train_is_eval=False),
    Method("EvoNormB0 (vectors)", lambda: modules.EvoNormB0(6), (3, 6), train_is_eval=False, maps=False),
    # an affine part from elsewhere
    Method(
        "ConditionalNorm",
        lambda: modules.ConditionalNorm(modules.GroupNorm(6, 2, affine=False), 3),
        IMAGE,
        more=((3, 3),),
    ),
    Method("AdaptiveInstanceNorm", lambda: modules.AdaptiveInstanceNorm(), IMAGE, more=((3, 6, 2, 3),)),
    # no statistics
    Method("DynamicTanh", lambda: modules.DynamicTanh(6), (3, 5, 6), maps=False),
    Method("DynamicTanh (channels)", lambda: modules.DynamicTanh(6, channel_dim=1), IMAGE),
    # weights
    Method(
        "WeightStandardizedConv1d",
        lambda: modules.WeightStandardizedConv1d(6, 4, 1),
        (3, 6, 5),
        half_parameters=True,
        variant=True,
        keeps_layout=False,
    ),
    Method("WeightStandardizedConv2d", lambda: modules.WeightStandardizedConv2d(6, 4, 1), IMAGE, half_parameters=True),
    Method(
        "WeightStandardizedConv3d",
        lambda: modules.WeightStandardizedConv3d(6, 4, 1),
        (3, 6, 2, 3, 2),
        half_parameters=True,
        keeps_layout=False,
        variant=True,
    ),
    Method(
        "WeightCentralizedConv1d",
        lambda: modules.WeightCentralizedConv1d(6, 4, 1),
        (3, 6, 5),
        half_parameters=True,
        variant=True,
        keeps_layout=False,
    ),
    Method("WeightCentralizedConv2d", lambda: modules.WeightCentralizedConv2d(6, 4, 1), IMAGE, half_parameters=True),
    Method(
        "WeightCentralizedConv3d",
        lambda: modules.WeightCentralizedConv3d(6, 4, 1),
        (3, 6, 2, 3, 2),
        half_parameters=True,
        keeps_layout=False,
        variant=True,
    ),
    Method(
        "weight_centralization",
        lambda: modules.weight_centralization(nn.Linear(6, 4)),
        (3, 6),
        maps=False,
        pickles=False,
        half_parameters=True,
    ),
    Method(
        "weight_standardization",
        lambda: modules.weight_standardization(nn.Linear(6, 4)),
        (3, 6),
        maps=False,
        pickles=False,
        half_parameters=True,
    ),
    Method(
        "spectral_norm",
        lambda: modules.spectral_norm(nn.Linear(6, 4)),
        (3, 6),
        maps=False,
        train_is_eval=False,
        pickles=False,
        half_parameters=True,
        follows_weights=True,
        constants="the vectors of the power iteration",
    ),
    Method(
        "spectral_norm (operator)",
        lambda: modules.spectral_norm(nn.Conv2d(6, 4, 1), norm="operator", input_shape=(5, 4)),
        IMAGE,
        train_is_eval=False,
        pickles=False,
        half_parameters=True,
        follows_weights=True,
        constants="the vectors of the power iteration",
    ),
    # features
    Method(
        "RunningNorm",
        lambda: modules.RunningNorm(6),
        (3, 6),
        train_is_eval=False,
        maps=False,
        constants="the moments of what it has seen",
    ),
    Method("Standardize", lambda: _fitted(modules.Standardize(6)), (3, 6), maps=False),
    Method("MinMaxScale", lambda: _fitted(modules.MinMaxScale(6)), (3, 6), maps=False),
]

# Public layers that another file runs through its own checks, and why.
ELSEWHERE = {
    "BatchNorm": "torch's own arithmetic, whose empty batches count",
    "SyncStatistics": "the base of a family",
    "LayerNormLSTM": "sequences and states in, sequences and states out",
    "BatchNormLSTM": "sequences and states in, sequences and states out",
}


def inputs(method: Method, *, batch: int | None = None, space: int | None = None) -> tuple[torch.Tensor, ...]:
    """Random float64 inputs; with another number of samples, or with maps shrunk to 1 or 2 values."""
    torch.manual_seed(11)
    shapes = [method.shape, *method.more]
    if space is not None and method.maps:
        shapes[0] = (*method.shape[:2], space, *[1] * (len(method.shape) - 3))
    shapes = [shape if batch is None else (batch, *shape[1:]) for shape in shapes]
    return tuple(torch.randn(shape, dtype=torch.float64) * 1.5 + 0.3 for shape in shapes)


def layer(method: Method) -> nn.Module:
    """A float64 layer whose parameters are not what they start as: one that forgets them fails."""
    torch.manual_seed(12)
    made = method.make().double()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return made
