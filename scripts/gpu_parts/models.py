"""ResNet-50 and a segmentation head in training, samples a second with each batch norm; forward and backward, no optimizer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_parts.timing import medians, random
from torch import Tensor, nn
from torch.nn import functional as F

import syncnorm

Norm = Callable[[int, bool], nn.Module]


class Plain(nn.Module):
    """Batch norm, and what follows it as operations of their own."""

    def __init__(self, channels: int, relu: bool, ours: bool) -> None:
        super().__init__()
        self.norm = syncnorm.SyncBatchNorm2d(channels, backend="triton") if ours else nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


def fused(channels: int, relu: bool) -> nn.Module:
    return syncnorm.SyncBatchNorm2d(channels, activation="relu" if relu else None, backend="triton")


PROVIDERS: dict[str, Norm] = {
    "ours, fused": fused,
    "ours, as a drop-in": lambda channels, relu: Plain(channels, relu, True),
    "nn.BatchNorm2d": lambda channels, relu: Plain(channels, relu, False),
}


class Bottleneck(nn.Module):
    def __init__(self, norm: Norm, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(inputs, width, 1, bias=False), norm(width, True)
        self.b, self.norm_b = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width, True)
        self.c, self.norm_c = nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width, True)
        self.short = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False) if stride > 1 or inputs != 4 * width else None
        self.norm_short = norm(4 * width, False) if self.short else None

    def forward(self, x: Tensor) -> Tensor:
        short = self.norm_short(self.short(x)) if self.short and self.norm_short else x
        return self.norm_c(self.c(self.norm_b(self.b(self.norm_a(self.a(x))))), residual=short)


def resnet50(norm: Norm, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """He et al. (2015), with the stride in the 3×3 convolution."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width, True), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            layers.append(Bottleneck(norm, inputs, width << stage, 2 if stage and not i else 1))
            inputs = 4 * width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def head(norm: Norm, inputs: int = 2048, width: int = 256) -> nn.Module:
    """The part of a segmentation network behind its backbone: two 3×3 convolutions on wide maps, then classes."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1, bias=False), norm(width, True),
        nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width, True),
        nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width, True), nn.Conv2d(width, 19, 1),
    )  # fmt: skip


def run(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Rows: model, batch, layout, provider, ms a step, samples a second."""
    models: dict[str, tuple[Callable[[Norm], nn.Module], tuple[int, ...]]] = {
        "ResNet-50": (resnet50, (128, 3, 224, 224)),
        "segmentation head": (head, (4, 2048, 128, 128)),
    }
    if dry:
        models = {"ResNet, tiny": (lambda norm: resnet50(norm, (1,), 4), (2, 3, 16, 16))}
    for name, (build, shape) in models.items():
        for channels_last in (True,) if dry else (True, False):
            x = random(shape, torch.float32, device, channels_last)
            steps = {}
            for provider, norm in PROVIDERS.items():
                model = build(norm).to(device)
                steps[provider] = _step(
                    model.to(memory_format=torch.channels_last) if channels_last else model, x, device
                )
            times = medians(steps, device, rounds=3 if dry else 9, seconds=6.0)
            for provider, seconds in times.items():
                yield {
                    "model": name, "batch": str(shape), "layout": "NHWC" if channels_last else "NCHW", "provider": provider,
                    "ms": round(seconds * 1e3, 2), "samples/s": round(shape[0] / seconds),
                }  # fmt: skip


def _step(model: nn.Module, x: Tensor, device: str) -> Callable[[], object]:
    parameters = list(model.parameters())

    def step() -> object:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(x).float().square().mean()
        return torch.autograd.grad(loss, parameters)

    return step
