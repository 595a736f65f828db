"""Layers for many seeds and many ranks in one process, so that a cell of the study takes seconds on one core.

A tensor has the channels of all seeds side by side, [N, S*C, *]; seeds meet nowhere. The batch is that of all ranks,
rank after rank, N = R*b. A batch norm without synchronisation sees R*S*C channels of b samples: the same arithmetic as R
processes with their own buffers, which `ranks.py` shows over real ones. SyncBN is the plain layer over all N.
"""

# N batch of all ranks, S seeds, C channels of a seed, R ranks, b batch of a rank

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncnorm import modules


class Linear(nn.Linear):
    """One linear layer for each seed: [N, S*I, *] to [N, S*O, *]; the features are in dim 1 whatever follows."""

    def __init__(self, num_in: int, num_out: int, seeds: int, bias: bool = True) -> None:
        super().__init__(num_in, seeds * num_out, bias)
        self.seeds = seeds

    def forward(self, x: Tensor) -> Tensor:
        num, seeds = x.size(0), self.seeds
        weight = self.weight.view(seeds, -1, self.in_features)
        if x.dim() == 2:
            y = torch.bmm(x.view(num, seeds, -1).transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
            y = y.reshape(num, -1)
        else:
            y = torch.einsum("soi,nsi...->nso...", weight, x.view(num, seeds, -1, *x.shape[2:])).flatten(1, 2)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (x.dim() - 2))


def conv(num_in: int, num_out: int, size: int, seeds: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution for each seed, without a bias."""
    pad = dilation * (size // 2)
    return nn.Conv2d(seeds * num_in, seeds * num_out, size, stride, pad, dilation, groups=seeds, bias=False)


class Affine(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * (x.dim() - 2)
        return torch.addcmul(self.bias.view(-1, *ones), x, self.weight.view(-1, *ones))


class PerRank(nn.Module):
    """A batch norm of ``channels`` on each of ``ranks`` ranks, none of which knows of the others.

    γ and β are shared, as DDP keeps them equal; running statistics are each rank's own, and evaluation takes their mean
    over ranks, as `syncnorm.GhostBatchNorm` does. With one rank this is the plain layer.
    """

    def __init__(self, make: Callable[[int, bool], nn.Module], channels: int, ranks: int) -> None:
        super().__init__()
        self.ranks, self.norm = ranks, make(ranks * channels, ranks == 1)
        self.affine = nn.Identity() if ranks == 1 else Affine(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return self.norm(x)
        if not self.training:
            mean, var = (s.view(self.ranks, -1).mean(0) for s in (self.norm.running_mean, self.norm.running_var))
            return self.affine(F.batch_norm(x, mean, var, eps=self.norm.eps))
        batch = x.size(0) // self.ranks
        mine = x.view(self.ranks, batch, *x.shape[1:]).transpose(0, 1).reshape(batch, -1, *x.shape[2:])
        y = self.norm(mine).view(batch, self.ranks, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        return self.affine(y)


class PerSample(nn.Module):
    """A norm of samples, without its affine part: the seeds become samples."""

    def __init__(self, norm: nn.Module, seeds: int, channels: int) -> None:
        super().__init__()
        self.seeds, self.norm, self.affine = seeds, norm, Affine(seeds * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(self.norm(x.reshape(x.size(0) * self.seeds, -1, *x.shape[2:])).view(x.shape))


class PerSeed(nn.Module):
    """A layer for each seed, for those with parameters that are not per channel."""

    def __init__(self, make: Callable[[], nn.Module], seeds: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(make() for _ in range(seeds))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.each), 1)
        return torch.cat([layer(part.contiguous()) for layer, part in zip(self.each, parts, strict=True)], 1)


class PerRankSwitchable(nn.Module):
    """SwitchableNorm on each rank for itself: `syncnorm.SwitchableNorm`'s equations, as its logits are per seed.

    (A test compares; copies of the layer for S seeds and R ranks would take S*R calls.)
    """

    def __init__(self, seeds: int, channels: int, ranks: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.ranks, self.momentum, self.eps = ranks, momentum, eps
        self.mean_logits, self.var_logits = (nn.Parameter(torch.ones(3, seeds, 1)) for _ in range(2))
        self.affine = Affine(seeds * channels)
        self.register_buffer("running_mean", torch.zeros(seeds, channels))
        self.register_buffer("running_var", torch.ones(seeds, channels))

    def forward(self, x: Tensor) -> Tensor:
        num, (seeds, channels) = x.size(0), self.running_mean.shape
        values = x.reshape(num, seeds, channels, -1)
        var, mean = torch.var_mean(values, -1, correction=0)  # of a sample and channel
        layer_mean = mean.mean(2, keepdim=True)
        layer_var = (var + (mean - layer_mean).square()).mean(2, keepdim=True)
        if self.training:
            by_rank = mean.view(self.ranks, -1, seeds, channels)
            batch_mean = by_rank.mean(1, keepdim=True)
            batch_var = (var.view(by_rank.shape) + (by_rank - batch_mean).square()).mean(1, keepdim=True)
            count = num // self.ranks * values.size(-1)
            with torch.no_grad():
                self.running_mean.lerp_(batch_mean.mean((0, 1)), self.momentum)
                self.running_var.lerp_(batch_var.mean((0, 1)) * count / max(count - 1, 1), self.momentum)
            batch_mean, batch_var = (s.expand_as(by_rank).reshape(mean.shape) for s in (batch_mean, batch_var))
        else:
            batch_mean, batch_var = self.running_mean, self.running_var
        by_mean, by_var = self.mean_logits.softmax(0), self.var_logits.softmax(0)
        mean = by_mean[0] * mean + by_mean[1] * layer_mean + by_mean[2] * batch_mean
        var = by_var[0] * var + by_var[1] * layer_var + by_var[2] * batch_var
        y = (values - mean.unsqueeze(-1)) * (var + self.eps).rsqrt().unsqueeze(-1)
        return self.affine(y.view(x.shape))


@dataclass(frozen=True)
class Norms:
    """How a model's norms are made: which method, for how many seeds, over how many ranks.

    Attributes:
        method: A key of ``METHODS``.
        seeds: S.
        ranks: R; only methods that know batches and do not synchronise care.
        momentum: Of running statistics; None for the method's own here.
        tokens: Whether dim 2 on are tokens, normalised one by one in LayerNorm, and not a map, normalised as one.
    """

    method: str
    seeds: int
    ranks: int = 1
    momentum: float | None = None
    tokens: bool = False

    def __call__(self, channels: int, dims: int) -> nn.Module:
        """A norm of ``channels`` channels, for a tensor of ``dims`` dims; without an activation if that is separate."""
        return METHODS[self.method].make(self, channels, dims)

    def act(self, channels: int, dims: int) -> nn.Module:
        """The activation that goes with it."""
        if self.method == "FilterResponseNorm":
            return modules.TLU(self.seeds * channels)
        return nn.Identity() if self.method.startswith("EvoNorm") else nn.ReLU()

    def weights(self, layer: nn.Module) -> nn.Module:
        """``layer`` with what the method does to weights."""
        change = METHODS[self.method].weights
        return change(layer) if change else layer


@dataclass(frozen=True)
class Method:
    make: Callable[[Norms, int, int], nn.Module]
    knows_batch: bool = False  # whether the batch per rank matters
    weights: Callable[[nn.Module], nn.Module] | None = None


def _batch(local: bool, kind: str, momentum: float) -> Callable[[Norms, int, int], nn.Module]:
    def make(norms: Norms, channels: int, dims: int) -> nn.Module:
        layer = getattr(modules, kind + ("2d" if dims == 4 else "1d"))
        used = momentum if norms.momentum is None else norms.momentum
        return PerRank(
            lambda c, affine: layer(c, affine=affine, momentum=used),
            norms.seeds * channels,
            norms.ranks if local else 1,
        )

    return make


def _samples(make: Callable[[int, bool], nn.Module]) -> Callable[[Norms, int, int], nn.Module]:
    return lambda norms, channels, dims: PerSample(make(channels, norms.tokens), norms.seeds, channels)


def _layer_norm(channels: int, tokens: bool) -> nn.Module:
    if tokens:
        return modules.LayerNorm(channels, elementwise_affine=False, channel_dim=1)
    return modules.GroupNorm(channels, 1, affine=False)  # the paper's LayerNorm of a map: all of a sample


def _rms_norm(channels: int, tokens: bool) -> nn.Module:
    return modules.RMSNorm(channels, elementwise_affine=False, channel_dim=1)


def _group_norm(channels: int, tokens: bool) -> nn.Module:
    return modules.GroupNorm(channels, math.gcd(8, channels), affine=False)


def _maps(kind: str, **options: float | bool) -> Callable[[Norms, int, int], nn.Module]:
    """Layers all of whose parameters are per channel: seeds are channels."""

    def make(norms: Norms, channels: int, dims: int) -> nn.Module:
        layer = getattr(modules, kind + ("2d" if kind in ("InstanceNorm", "BatchInstanceNorm") else ""))
        groups = (norms.seeds * math.gcd(8, channels),) if kind == "EvoNormS0" else ()
        return layer(norms.seeds * channels, *groups, **options)

    return make


METHODS = {
    "none": Method(lambda norms, channels, dims: nn.Identity()),
    "BN": Method(_batch(True, "SyncBatchNorm", 0.1), knows_batch=True),
    "SyncBN": Method(_batch(False, "SyncBatchNorm", 0.1)),
    # The paper's momentum of 0.01 is for runs of 100,000 steps and more; these have a few hundred.
    "BatchRenorm": Method(_batch(True, "BatchRenorm", 0.1), knows_batch=True),
    "MABN": Method(
        _batch(True, "MovingAverageBatchNorm", 0.02), knows_batch=True, weights=modules.weight_centralization
    ),
    "SwitchableNorm": Method(
        lambda norms, channels, dims: PerRankSwitchable(norms.seeds, channels, norms.ranks), knows_batch=True
    ),
    "GroupNorm": Method(_samples(_group_norm)),
    "GroupNorm+WS": Method(_samples(_group_norm), weights=modules.weight_standardization),
    "LayerNorm": Method(_samples(_layer_norm)),
    "RMSNorm": Method(_samples(_rms_norm)),
    "DynamicTanh": Method(
        lambda norms, channels, dims: PerSeed(lambda: modules.DynamicTanh(channels, channel_dim=1), norms.seeds)
    ),
    "InstanceNorm": Method(_maps("InstanceNorm", affine=True)),
    "BatchInstanceNorm": Method(_maps("BatchInstanceNorm")),
    "FilterResponseNorm": Method(_maps("FilterResponseNorm")),
    "EvoNormS0": Method(_maps("EvoNormS0")),
    "EvoNormB0": Method(_maps("EvoNormB0")),
}
