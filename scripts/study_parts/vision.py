"""Segmentation of textures, tables, and what instance normalisation does to style."""

from typing import Any

import torch
from torch import Tensor, nn

import syncnorm
from study_parts import data, models
from study_parts.layers import Norms
from study_parts.training import error_percent, fit
from syncnorm import modules

Row = dict[str, Any]

SCENES = 8  # in a step, of all ranks together


def segment_textures(
    seeds: list[int], *, method: str, batch: int = SCENES, lr: float = 0.01, steps: int = 150
) -> list[Row]:
    """Share of wrong pixels in scenes of two textures, from strips of the photographs that training has not seen."""
    norms = Norms(method, len(seeds), SCENES // batch)
    net = models.initialise(models.segmenter(norms), seeds)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def batches() -> Any:
        for _ in range(steps):
            each = [data.scenes(SCENES, draw, test=False) for draw in draws]
            yield torch.stack([x for x, _ in each], 1), torch.stack([y for _, y in each], 1)

    fit(net, batches(), steps, lr=lr, adam=True)
    test_x, test_y = data.scenes(100, torch.Generator().manual_seed(1000), test=True)
    errors = error_percent(net, test_x.unsqueeze(1), test_y, len(seeds))
    return [{"seed": seed, "error": error} for seed, error in zip(seeds, errors, strict=True)]


SCALINGS = ("raw", "min-max", "standardised", "BN on the input", "LN on the input")


def classify_table(seeds: list[int], *, table: str, scaling: str, lr: float = 0.03, epochs: int = 30) -> list[Row]:
    """Test error of a two-layer perceptron without norms, on features as they are or scaled; each seed splits anew."""
    x, y = data.table(table)
    num_test, num_features, num_classes = len(y) // 3, x.size(1), int(y.max()) + 1
    splits = [torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    train, test = (
        torch.stack([_scaled(x, split[num_test:], split[part], scaling) for split in splits], 1)
        for part in (slice(num_test, None), slice(num_test))
    )
    labels = torch.stack([y[split] for split in splits], 1)
    first: list[nn.Module] = []
    if scaling == "BN on the input":
        first = [Norms("SyncBN", len(seeds))(num_features, 2)]
    elif scaling == "LN on the input":
        first = [Norms("LayerNorm", len(seeds))(num_features, 2)]
    body = models.mlp(Norms("none", len(seeds)), num_in=num_features, num_out=num_classes, width=32, depth=2)
    net = models.initialise(nn.Sequential(*first, body), seeds)
    num_train = len(y) - num_test
    order = data.orders(num_train, seeds, epochs, 16)
    columns = torch.arange(len(seeds))
    fit(
        net,
        ((train[chosen, columns].flatten(1), labels[num_test:][chosen, columns]) for chosen in order),
        len(order),
        lr=lr,
    )
    net.eval()
    with torch.no_grad():
        wrong = net(test.flatten(1)).view(num_test, len(seeds), -1).argmax(2) != labels[:num_test]
    return [{"seed": s, "error": 100 * float(e)} for s, e in zip(seeds, wrong.float().mean(0), strict=True)]


def _scaled(x: Tensor, fitted_on: Tensor, part: Tensor, scaling: str) -> Tensor:
    if scaling in ("standardised", "min-max"):
        scaler = modules.Standardize(x.size(1)) if scaling == "standardised" else modules.MinMaxScale(x.size(1))
        return scaler.fit(x[fitted_on])(x[part]).float()
    return x[part]


def style_probe(seeds: list[int], *, norm: str, num: int = 600) -> list[Row]:
    """What a linear probe reads from random features: which of four exposures an image had, and which texture it shows.

    The features are channel means of conv-norm-ReLU-conv-ReLU with random filters; exposures are contrast and
    brightness of the whole image.
    """
    from sklearn.linear_model import LogisticRegression

    rows = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        kind, style = (torch.randint(high, (num,), generator=draw) for high in (3, 4))
        top, left = torch.randint(480, (num,), generator=draw), torch.randint(480, (num,), generator=draw)
        at = torch.arange(32)
        crops = data.textures()[kind[:, None, None], (top[:, None] + at)[:, :, None], (left[:, None] + at)[:, None, :]]
        contrast, brightness = torch.tensor([0.5, 0.5, 1.5, 1.5])[style], torch.tensor([-1.0, 1.0, -1.0, 1.0])[style]
        x = (crops * contrast[:, None, None] + brightness[:, None, None]).unsqueeze(1)
        one, two = (torch.randn(shape, generator=draw) for shape in ((32, 1, 5, 5), (32, 32, 3, 3)))
        layer = {
            "none": nn.Identity(),
            "BN": modules.SyncBatchNorm2d(32),
            "LayerNorm": modules.GroupNorm(32, 1),
            "GroupNorm": modules.GroupNorm(32, 8),
            "InstanceNorm": modules.InstanceNorm2d(32),
        }[norm]
        with torch.no_grad():
            features = nn.functional.conv2d(layer(nn.functional.conv2d(x, one)).relu(), two / 17).relu().mean((2, 3))
        features = modules.Standardize(32).fit(features)(features).numpy()
        row: Row = {"seed": seed}
        for what, labels in (("style", style.numpy()), ("texture", kind.numpy())):
            probe = LogisticRegression(max_iter=2000).fit(features[: num // 2], labels[: num // 2])
            row[f"{what}_error"] = 100 * (1 - probe.score(features[num // 2 :], labels[num // 2 :]))
        rows.append(row)
    return rows


def transferred_style(seeds: list[int]) -> list[Row]:
    """AdaIN between two photographs: how far channel means and deviations are from the style's, before and after."""
    from sklearn.datasets import load_sample_images

    china, flower = (torch.tensor(image).permute(2, 0, 1).float()[None] / 255 for image in load_sample_images().images)
    rows = []
    for seed in seeds:
        filters = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) / 75**0.5
        content, style = (nn.functional.conv2d(image[..., ::2, ::2], filters) for image in (china, flower))
        moved = modules.AdaptiveInstanceNorm()(content, style)

        def gap(a: Tensor, b: Tensor) -> float:
            parts = [torch.stack([x.mean((2, 3)), x.std((2, 3))]) for x in (a, b)]
            return float((parts[0] - parts[1]).norm() / parts[1].norm())

        def structure(a: Tensor, b: Tensor) -> float:
            a, b = (syncnorm.InstanceNorm2d(16)(x).flatten() for x in (a, b))
            return float((a * b).mean())

        rows.append(
            {
                "seed": seed,
                "style_gap_before": gap(content, style),
                "style_gap_after": gap(moved, style),
                "content_correlation": structure(moved, content),
            }
        )
    return rows
