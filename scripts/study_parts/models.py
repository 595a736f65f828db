"""The study's models, each for S seeds at once; a seed's weights are its own, however many others there are."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study_parts.layers import Linear, Norms, conv


def mlp(norms: Norms, *, num_in: int = 64, num_out: int = 10, width: int = 128, depth: int = 3) -> nn.Module:
    """[N, S*num_in] to [N, S*num_out]."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [norms.weights(Linear(width if i else num_in, width, norms.seeds)), norms(width, 2)]
        layers.append(norms.act(width, 2))
    return nn.Sequential(*layers, Linear(width, num_out, norms.seeds))


class Block(nn.Module):
    """Two 3×3 convolutions around which the input is carried."""

    def __init__(self, norms: Norms, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.first = norms.weights(conv(num_in, num_out, 3, norms.seeds, stride))
        self.second = norms.weights(conv(num_out, num_out, 3, norms.seeds))
        self.norms = nn.ModuleList(norms(num_out, 4) for _ in range(2))
        self.acts = nn.ModuleList(norms.act(num_out, 4) for _ in range(2))
        self.short = (
            nn.Identity()
            if stride == 1 and num_in == num_out
            else nn.Sequential(norms.weights(conv(num_in, num_out, 1, norms.seeds, stride)), norms(num_out, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.acts[0](self.norms[0](self.first(x)))
        return self.acts[1](self.norms[1](self.second(y)) + self.short(x))


class ResNet(nn.Module):
    """[N, S, 8, 8] to [N, S*10]. With a stem of stride 2 the maps are 4×4, 2×2, 1×1; else 8×8, 4×4, 2×2."""

    def __init__(self, norms: Norms, *, stem_stride: int = 2, width: int = 16) -> None:
        super().__init__()
        self.stem = norms.weights(conv(1, width, 3, norms.seeds, stem_stride))
        self.norm, self.act = norms(width, 4), norms.act(width, 4)
        self.blocks = nn.Sequential(
            Block(norms, width, width, 1), Block(norms, width, 2 * width, 2), Block(norms, 2 * width, 4 * width, 2)
        )
        self.head = Linear(4 * width, 10, norms.seeds)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.norm(self.stem(x)))).mean((2, 3)))


def segmenter(norms: Norms, *, width: int = 12, num_out: int = 3) -> nn.Module:
    """[N, S, H, W] to [N, S*num_out, H, W]; sees 31×31 pixels around each."""
    layers: list[nn.Module] = []
    for i, dilation in enumerate((1, 2, 4, 8)):
        layers += [norms.weights(conv(width if i else 1, width, 3, norms.seeds, dilation=dilation)), norms(width, 4)]
        layers.append(norms.act(width, 4))
    return nn.Sequential(*layers, conv(width, num_out, 1, norms.seeds))


class Transformer(nn.Module):
    """A pre-norm vision transformer: [N, S, 8, 8] in 16 patches of 2×2 to [N, S*10]; tokens are in dim 2."""

    def __init__(self, norms: Norms, *, width: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        seeds = norms.seeds
        self.seeds, self.heads = seeds, heads
        self.embed = Linear(4, width, seeds)
        self.position = nn.Parameter(torch.zeros(seeds * width, 16))
        self.norms = nn.ModuleList(norms(width, 3) for _ in range(2 * depth + 1))
        self.qkv = nn.ModuleList(Linear(width, 3 * width, seeds) for _ in range(depth))
        self.out = nn.ModuleList(Linear(width, width, seeds) for _ in range(depth))
        self.up = nn.ModuleList(Linear(width, 2 * width, seeds) for _ in range(depth))
        self.down = nn.ModuleList(Linear(2 * width, width, seeds) for _ in range(depth))
        self.head = Linear(width, 10, seeds)

    def forward(self, x: Tensor) -> Tensor:
        num = x.size(0)
        patches = x.view(num, self.seeds, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(num, -1, 16)
        x = self.embed(patches) + self.position
        for i, (qkv, out, up, down) in enumerate(zip(self.qkv, self.out, self.up, self.down, strict=True)):
            q, k, v = qkv(self.norms[2 * i](x)).view(num, self.seeds, 3, self.heads, -1, 16).transpose(4, 5).unbind(2)
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(3, 4).reshape(num, -1, 16))
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return self.head(self.norms[-1](x).mean(2))


def initialise(model: nn.Module, seeds: list[int], scale: float = 1.0) -> nn.Module:
    """Draws every weight as torch's layers do, seed by seed; then times ``scale``, biases too."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = scale / math.sqrt(layer.weight[0].numel())
                for name, parameter in layer.named_parameters():  # below a parametrization the name is another
                    if name.startswith(("weight", "bias", "parametrizations.weight")):
                        for part, draw in zip(parameter.chunk(len(seeds)), draws, strict=True):
                            part.uniform_(-bound, bound, generator=draw)
            if isinstance(layer, Transformer):
                for part, draw in zip(layer.position.chunk(len(seeds)), draws, strict=True):
                    part.normal_(std=0.02, generator=draw)
    return model
