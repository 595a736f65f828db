"""Experiments that train classifiers of digits: batch per rank, methods, rates, shards, scales, dropout, noise, shift."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import syncnorm
from study_parts import data, models
from study_parts.layers import Norms
from study_parts.training import (
    Batch,
    by_seed,
    each_cross_entropy,
    error_percent,
    fit,
    logits_of,
    tiled,
)

Row = dict[str, Any]

IMAGES = (1, 8, 8)
MODELS = {  # how a model is made, and the shape of one sample
    "mlp": (models.mlp, (64,)),
    "resnet_stride2": (models.ResNet, IMAGES),
    "resnet": (lambda norms: models.ResNet(norms, stem_stride=1), IMAGES),
    "vit": (models.Transformer, IMAGES),
}


def build(
    model: str, seeds: list[int], method: str, batch: int, momentum: float | None = None, scale: float = 1.0
) -> Any:
    """A new model on ranks of ``batch`` samples each, of 32 in all, and the shape of its samples."""
    make, shape = MODELS[model]
    norms = Norms(method, len(seeds), data.BATCH // batch, momentum, tokens=model == "vit")
    return models.initialise(make(norms), seeds, scale), shape


def batches(
    images: Tensor, labels: Tensor, order: Tensor, shape: tuple[int, ...], *, by_label: bool
) -> Iterator[Batch]:
    """What all ranks have in each step of ``order`` [steps, 32, S]; ``by_label`` gives neighbours the same digits."""
    for chosen in order:
        if by_label:
            chosen = chosen.gather(0, labels[chosen].sort(dim=0, stable=True).indices)
        yield images[chosen].view(len(chosen), -1, *shape[1:]), labels[chosen]


def train_digits(
    seeds: list[int],
    *,
    model: str = "mlp",
    method: str,
    batch: int = data.BATCH,
    lr: float = 0.03,
    epochs: int = 10,
    adam: bool = False,
    by_label: bool = False,
    scale: float = 1.0,
    num_train: int = data.NUM_TRAIN,
    early: list[int] | None = None,
) -> list[Row]:
    """Test and training error after training; ``early`` adds the test error after so many steps.

    A layer that refuses the batch (one value per channel has no variance) leaves the errors empty and its words.
    """
    images, labels, test_x, test_y = data.digits()
    images, labels = images[:num_train], labels[:num_train]
    net, shape = build(model, seeds, method, batch, scale=scale)
    order = data.orders(num_train, seeds, epochs)
    rows: list[Row] = [{"seed": seed} for seed in seeds]
    test = test_x.view(-1, *shape)

    def after(step: int, loss: Tensor) -> None:
        if step in (early or ()):
            for row, error in zip(rows, error_percent(net, test, test_y, len(seeds)), strict=True):
                row[f"error_{step}"] = error

    try:
        fit(
            net,
            batches(images, labels, order, shape, by_label=by_label),
            len(order),
            lr=lr,
            adam=adam,
            weight_decay=0.05 if adam else 1e-4,
            after=after,
        )
    except ValueError as refused:
        if "1 value per channel" not in str(refused):
            raise
        return [row | {"note": "refused: one value per channel"} for row in rows]
    errors = error_percent(net, test, test_y, len(seeds))
    train_errors = error_percent(net, images.view(-1, *shape), labels, len(seeds))
    logits = torch.cat(list(logits_of(net, [tiled(test, len(seeds))])))
    losses = each_cross_entropy(logits, test_y[:, None].expand(-1, len(seeds))).tolist()
    for i, row in enumerate(rows):
        row |= {"error": errors[i], "train_error": train_errors[i], "test_loss": losses[i]}
        row |= _shares(net, i)
    return rows


def _shares(net: nn.Module, seed: int) -> Row:
    """What a switchable norm has learned, mean over the layers, for the variances."""
    layers = [m.var_logits[:, seed, 0].softmax(0) for m in net.modules() if hasattr(m, "var_logits")]
    if not layers:
        return {}
    shares = torch.stack(layers).mean(0).tolist()
    return dict(zip(("share_instance", "share_layer", "share_batch"), shares, strict=True))


def lagging_statistics(
    seeds: list[int], *, momentum: float, step: int, model: str = "mlp", lr: float = 0.03
) -> list[Row]:
    """Test error after ``step`` steps with the exponential averages, and after `syncnorm.recalibrate` on the training set."""
    images, labels, test_x, test_y = data.digits()
    net, shape = build(model, seeds, "SyncBN", data.BATCH, momentum)
    order = data.orders(data.NUM_TRAIN, seeds, 10)
    fit(net, batches(images, labels, order[:step], shape, by_label=False), len(order), lr=lr)
    test = test_x.view(-1, *shape)
    average = error_percent(net, test, test_y, len(seeds))
    net.train()
    syncnorm.recalibrate(net, [tiled(part.view(-1, *shape), len(seeds)) for part in images.split(200)])
    precise = error_percent(net, test, test_y, len(seeds))
    return [
        {"seed": seed, "error_average": a, "error_recalibrated": p}
        for seed, a, p in zip(seeds, average, precise, strict=True)
    ]


def dropout_order(seeds: list[int], *, place: str, rate: float = 0.5, lr: float = 0.03, epochs: int = 10) -> list[Row]:
    """Variance that the last norm meets in evaluation over the one it remembers, and the error it comes to.

    ``place``: 'none'; 'before' or 'after' each norm; 'last', only before the last linear layer.
    """
    images, labels, test_x, test_y = data.digits()
    norms = Norms("SyncBN", len(seeds))
    layers = list(models.mlp(norms))
    changed: list[nn.Module] = []
    for i, layer in enumerate(layers):
        is_norm = i % 3 == 1 and i < len(layers) - 1
        drop = (place == "before" and is_norm) or (place == "last" and i == len(layers) - 1)
        changed += [nn.Dropout(rate), layer] if drop else [layer]
        if place == "after" and i % 3 == 2:
            changed.append(nn.Dropout(rate))
    net = models.initialise(nn.Sequential(*changed), seeds)
    torch.manual_seed(seeds[0])  # the masks
    order = data.orders(data.NUM_TRAIN, seeds, epochs)
    fit(net, batches(images, labels, order, (64,), by_label=False), len(order), lr=lr)
    last = [layer for layer in net.modules() if isinstance(layer, syncnorm.SyncBatchNorm1d)][-1]
    met: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
    list(logits_of(net, [tiled(images, len(seeds))]))
    handle.remove()
    ratio = (torch.cat(met).var(0) / last.running_var).view(len(seeds), -1).mean(1).tolist()
    errors = error_percent(net, test_x, test_y, len(seeds))
    return [{"seed": s, "variance_ratio": r, "error": e} for s, r, e in zip(seeds, ratio, errors, strict=True)]


def noise_of_companions(
    seeds: list[int], *, method: str, batch: int = data.BATCH, lr: float = 0.03, num_train: int = 200, steps: int = 300
) -> list[Row]:
    """Few images and many steps: what the noise of batch statistics is, and whether it helps.

    ``noise`` is the standard deviation of a training image's logits over 20 random companies, over that of the logits
    between images; both in training mode.
    """
    images, labels, test_x, test_y = data.digits()
    images, labels = images[:num_train], labels[:num_train]
    net, _ = build("mlp", seeds, method, batch)
    order = data.orders(num_train, seeds, -(-steps // (num_train // data.BATCH)))[:steps]
    fit(net, batches(images, labels, order, (64,), by_label=False), steps, lr=lr)
    errors = error_percent(net, test_x, test_y, len(seeds))
    train_errors = error_percent(net, images, labels, len(seeds))
    logits = torch.cat(list(logits_of(net, [tiled(test_x, len(seeds))])))
    losses = each_cross_entropy(logits, test_y[:, None].expand(-1, len(seeds))).tolist()
    net.train()
    draw, seen = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _ in range(20):
            company = torch.randperm(num_train - 1, generator=draw)[: data.BATCH - 1] + 1
            chosen = torch.cat([torch.zeros(1, dtype=torch.int64), company])
            seen.append(by_seed(net(tiled(images[chosen], len(seeds))), len(seeds)))
    logits = torch.stack(seen)  # [20, N, S, K]
    noise = (logits[:, 0].std(0).mean(1) / logits.flatten(0, 1).std(0).mean(1)).tolist()
    return [
        {"seed": seed, "error": e, "train_error": t, "test_loss": loss, "noise": n}
        for seed, e, t, loss, n in zip(seeds, errors, train_errors, losses, noise, strict=True)
    ]


def shifted_domain(seeds: list[int], *, method: str, lr: float = 0.03, epochs: int = 8) -> list[Row]:
    """Trained on digits as they are, tested on shifted ones; batch norms also adapted, by AdaBN and TENT."""
    images, labels, test_x, test_y = data.digits()
    net, shape = build("resnet", seeds, method, data.BATCH)
    order = data.orders(data.NUM_TRAIN, seeds, epochs)
    fit(net, batches(images, labels, order, shape, by_label=False), len(order), lr=lr)
    rows: list[Row] = []
    for shift in data.SHIFTS:
        test = data.shifted(test_x, shift).view(-1, *shape)
        found = {"none": error_percent(net, test, test_y, len(seeds))}
        if method == "SyncBN":
            found |= _adapted(net, test, test_y, len(seeds))
        rows += [
            {"seed": seed, "shift": shift, "adapted": how, "error": error}
            for how, errors in found.items()
            for seed, error in zip(seeds, errors, strict=True)
        ]
    return rows


def _adapted(net: nn.Module, test: Tensor, test_y: Tensor, seeds: int) -> dict[str, list[float]]:
    """Errors with the statistics of the tests (AdaBN), and with entropy minimised over them once (TENT)."""
    parts = [tiled(part, seeds) for part in test.split(200)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    syncnorm.adapt_batch_norm(net, parts)
    adapted = {"AdaBN": error_percent(net, test, test_y, seeds)}
    net.load_state_dict(before)
    wrong = torch.zeros(seeds)
    with syncnorm.TentAdapter(net, logits=lambda output: by_seed(output, seeds).transpose(1, 2)) as adapter:
        for x, y in zip(parts, test_y.split(200), strict=True):
            wrong += (by_seed(adapter(x), seeds).argmax(2) != y[:, None]).sum(0)
    adapted["TENT"] = (100 * wrong / len(test_y)).tolist()
    return adapted
