"""GANs: on a ring of eight Gaussians, what the critic's norm does to modes, and how a score depends on its company."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study_parts import models
from study_parts.layers import Norms
from syncnorm import modules

Row = dict[str, Any]

MODES, SPREAD = 8, 0.05
CRITICS = {  # the norm of the critic's hidden layers
    "none": "none",
    "BN, real and fake apart": "SyncBN",
    "BN, real and fake together": "SyncBN",
    "LayerNorm": "LayerNorm",
    "GroupNorm": "GroupNorm",
    "spectral_norm": "none",
}


class SpectralLinear(nn.Module):
    """A linear layer for each seed, each with its own spectral norm."""

    def __init__(self, num_in: int, num_out: int, seeds: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules.spectral_norm(nn.Linear(num_in, num_out)) for _ in range(seeds))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.each), 1)
        return torch.cat([layer(part) for layer, part in zip(self.each, parts, strict=True)], 1)


def ring(num: int, seeds: int) -> Tensor:
    """Samples of the data, [num, S*2]."""
    angle = 2 * math.pi * torch.randint(MODES, (num, seeds)) / MODES
    return (torch.stack([angle.cos(), angle.sin()], 2) + SPREAD * torch.randn(num, seeds, 2)).flatten(1)


def train_gan(seeds: list[int], *, critic: str, steps: int = 1500, batch: int = 64, lr: float = 1e-3) -> list[Row]:
    """Modes that the generator reaches, and the share of its samples within four deviations of one.

    A mode counts from 1 % of 1,000 samples on. ``company_noise`` is the standard deviation of a real sample's score over
    50 random companies, over that of the scores between real samples; ``company_kind`` is how far its score moves if the
    company is fake instead of real, likewise. Both in training mode, as the critic is used.
    """
    num = len(seeds)
    torch.manual_seed(seeds[0])
    norms = Norms(CRITICS[critic], num)
    generator = models.mlp(Norms("none", num), num_in=8, num_out=2, width=64, depth=2)
    if critic == "spectral_norm":
        layers = [SpectralLinear(i, o, num) for i, o in ((2, 64), (64, 64), (64, 1))]
        judge: nn.Module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    else:
        judge = models.initialise(models.mlp(norms, num_in=2, num_out=1, width=64, depth=2), seeds)
    models.initialise(generator, [seed + 100 for seed in seeds])
    # A critic of Lipschitz constant 1 per layer gives small gradients: its scores are scaled, as is usual.
    gain = 10.0 if critic == "spectral_norm" else 1.0
    together = critic == "BN, real and fake together"
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.99)) for net in (generator, judge))

    def fakes(count: int) -> Tensor:
        return generator(torch.randn(count, num * 8))

    def scores(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if together:
            both = judge(torch.cat([real, fake])) * gain
            return both[: len(real)], both[len(real) :]
        return judge(real) * gain, judge(fake) * gain

    for _ in range(steps):
        real = ring(batch, num)
        on_real, on_fake = scores(real, fakes(batch).detach())
        loss = (F.softplus(-on_real) + F.softplus(on_fake)).mean(0).sum()
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        _, on_fake = scores(real, fakes(batch))
        loss = F.softplus(-on_fake).mean(0).sum()
        opt_g.zero_grad()
        loss.backward()
        opt_g.step()

    with torch.no_grad():
        found = fakes(1000).view(1000, num, 2)
        noise, kind = _company(judge, ring(1, num), fakes, batch, num)
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    distance, nearest = (found.unsqueeze(2) - torch.stack([angle.cos(), angle.sin()], 1)).norm(dim=3).min(2)
    near = distance < 4 * SPREAD
    counts = torch.stack([((nearest == mode) & near).sum(0) for mode in range(MODES)])
    modes = (counts >= 10).sum(0)
    return [
        {
            "seed": seed,
            "modes": int(modes[i]),
            "near_percent": 100 * float(near[:, i].float().mean()),
            "company_noise": noise[i],
            "company_kind": kind[i],
        }
        for i, seed in enumerate(seeds)
    ]


def _company(judge: nn.Module, one: Tensor, fakes: Any, batch: int, num: int) -> tuple[list[float], list[float]]:
    judge = copy.deepcopy(judge).train()
    between = judge(ring(500, num)).std(0).clamp(min=1e-6)
    by_real = torch.stack([judge(torch.cat([one, ring(batch - 1, num)]))[0] for _ in range(50)])
    by_fake = torch.stack([judge(torch.cat([one, fakes(batch - 1)]))[0] for _ in range(50)])
    noise = by_real.std(0) / between
    return noise.tolist(), ((by_real.mean(0) - by_fake.mean(0)).abs() / between).tolist()
