"""Trains S seeds of one setting at once, and says how wrong each is."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncnorm import modules
from syncnorm.lightning import RenormSchedule

Batch = tuple[Tensor, Tensor]  # input [N, S*..., *], labels [N, S, *]
RENORM = (modules.BatchRenorm1d, modules.BatchRenorm2d)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over seeds of the mean cross-entropy of each: a seed's gradient is that of its own loss."""
    return each_cross_entropy(logits, labels).sum()


def each_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each seed [S], from logits [N, S*K, *] and labels [N, S, *]."""
    seeds = labels.size(1)
    values = F.cross_entropy(by_seed(logits, seeds).flatten(0, 1), labels.flatten(0, 1), reduction="none")
    return values.view(labels.shape).transpose(0, 1).flatten(1).mean(1)


def by_seed(logits: Tensor, seeds: int) -> Tensor:
    """[N, S*K, *] as [N, S, K, *]."""
    return logits.reshape(logits.size(0), seeds, -1, *logits.shape[2:])


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    *,
    lr: float,
    weight_decay: float = 1e-4,
    adam: bool = False,
    after: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> None:
    """SGD with momentum 0.9, or AdamW; the rate falls to 0 along a cosine over ``steps``.

    ``after`` is called with the number of steps made and the loss; the model is in training mode again after it.
    """
    model.train()
    optimizer: torch.optim.Optimizer
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    # The paper's schedule in proportion: 5,000, 40,000 and 25,000 steps of some 160,000.
    renorm = [layer for layer in model.modules() if isinstance(layer, RENORM)]
    limits = RenormSchedule(round(0.03 * steps), round(0.25 * steps), round(0.16 * steps)).limits
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        for layer in renorm:
            layer.r_max, layer.d_max = limits(step)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step + 1, loss.detach())
        model.train()


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """In evaluation mode; [N, S*K, *] for each batch."""
    model.eval()
    for x in batches:
        yield model(x)


def error_percent(model: nn.Module, x: Tensor, y: Tensor, seeds: int) -> list[float]:
    """Error of each seed on samples [N, ...] that all of them see, with labels [N, *]; over all pixels of a map."""
    wrong, total = torch.zeros(seeds), 0
    for logits, labels in zip(
        logits_of(model, (tiled(part, seeds) for part in x.split(200))), y.split(200), strict=True
    ):
        wrong += (by_seed(logits, seeds).argmax(2) != labels.unsqueeze(1)).transpose(0, 1).flatten(1).sum(1)
        total += labels.numel()
    return (100 * wrong / total).tolist()


def tiled(x: Tensor, seeds: int) -> Tensor:
    """The same input for all seeds: [N, I, *] to [N, S*I, *]."""
    return x.repeat(1, seeds, *[1] * (x.dim() - 2))
