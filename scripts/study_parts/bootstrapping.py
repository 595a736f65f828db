"""Reinforcement learning's target: TD(0) on a random walk, with the next states from another distribution than the states."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from study_parts import models
from study_parts.layers import Norms

Row = dict[str, Any]

DISCOUNT, DRIFT, SIGMA = 0.9, 0.2, 0.1
TARGETS = {
    "none": "none",
    "LayerNorm": "LayerNorm",
    "GroupNorm": "GroupNorm",
    "BN, batches apart": "SyncBN",  # target from a batch of next states alone, in training mode
    "BN, target in evaluation mode": "SyncBN",
    "BN, batches together": "SyncBN",  # CrossQ: states and next states in one batch
    "BatchRenorm, batches together": "BatchRenorm",
}


def reward(state: Tensor) -> Tensor:
    return (6 * state).sin()


def walk(state: Tensor, noise: Tensor) -> Tensor:
    """To the right, reflected at 0 and 1: next states crowd at the right end, states are uniform."""
    moved = state + DRIFT + SIGMA * noise
    moved = moved.abs()
    return torch.where(moved > 1, 2 - moved, moved).clamp(0, 1)


def true_values(num: int = 401) -> tuple[Tensor, Tensor]:
    """States [num] and their values by iteration on a fine grid."""
    states = torch.linspace(0, 1, num)
    noise = torch.erfinv(2 * (torch.arange(200) + 0.5) / 200 - 1) * 2**0.5  # quantiles of the normal
    at = walk(states[:, None], noise[None]) * (num - 1)
    low = at.floor().long().clamp(max=num - 2)
    part, values = at - low, torch.zeros(num)
    for _ in range(200):
        values = reward(states) + DISCOUNT * (values[low] * (1 - part) + values[low + 1] * part).mean(1)
    return states, values


def features(state: Tensor) -> Tensor:
    """Radial basis functions [*, 16] of a position."""
    return torch.exp(-((state.unsqueeze(-1) - torch.linspace(0, 1, 16)) ** 2) / (2 * 0.06**2))


def learn_values(seeds: list[int], *, target: str, steps: int = 1500, batch: int = 64, lr: float = 3e-3) -> list[Row]:
    """Root of the mean squared error of the learned values, relative to the spread of the true ones; evaluation mode.

    There is no second network: the target is the network of now, without gradient.
    """
    num, norms = len(seeds), Norms(TARGETS[target], len(seeds))
    net = models.initialise(models.mlp(norms, num_in=16, num_out=1, width=64, depth=2), seeds)
    torch.manual_seed(seeds[0])
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        state = torch.rand(batch, num)
        after = walk(state, torch.randn(batch, num))
        x, x_after = features(state).flatten(1), features(after).flatten(1)
        if "together" in target:
            value, value_after = net(torch.cat([x, x_after])).chunk(2)
        elif "evaluation" in target:
            value = net(x)
            net.eval()
            value_after = net(x_after)
            net.train()
        else:
            value = net(x)
            value_after = _without_tracking(net, x_after)
        goal = reward(state) + DISCOUNT * value_after.detach()
        loss = (value - goal).square().mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    states, values = true_values()
    net.eval()
    with torch.no_grad():
        found = net(features(states).repeat(1, num))
    errors = ((found - values[:, None]).square().mean(0).sqrt() / values.std()).tolist()
    return [{"seed": seed, "relative_error": error} for seed, error in zip(seeds, errors, strict=True)]


@torch.no_grad()
def _without_tracking(net: nn.Module, x: Tensor) -> Tensor:
    """By the batch's own statistics, which leave no trace: as a target network in training mode."""
    return copy.deepcopy(net)(x)
