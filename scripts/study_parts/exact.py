"""What is true to rounding, on real digits: invariances, and what gradients attribute to the input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from study_parts import data
from syncnorm import modules

Row = dict[str, Any]

WIDTH = 32
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "BN": lambda: modules.SyncBatchNorm1d(WIDTH, eps=1e-30),
    "LayerNorm": lambda: modules.LayerNorm(WIDTH, eps=1e-30),
    "RMSNorm": lambda: modules.RMSNorm(WIDTH, eps=1e-30),
    "GroupNorm": lambda: modules.GroupNorm(WIDTH, 4, eps=1e-30),
}
CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {  # of weights [O, I] and data [N, I]
    "weight matrix × 3": lambda w, x: (3 * w, x),
    "weight matrix + same row": lambda w, x: (w + torch.linspace(-1, 1, w.size(1), dtype=w.dtype), x),
    "one weight vector × 3": lambda w, x: (torch.cat([3 * w[:1], w[1:]]), x),
    "data × 3": lambda w, x: (w, 3 * x),
    "data + same sample": lambda w, x: (w, x + torch.linspace(-1, 1, x.size(1), dtype=x.dtype)),
    "one sample × 3": lambda w, x: (w, torch.cat([3 * x[:1], x[1:]])),
}


def invariance(seeds: list[int], *, norm: str, change: str) -> list[Row]:
    """Largest change of norm(x Wᵀ) over its largest value when weights or data change; float64, training mode."""
    rows = []
    x = data.digits()[0][:64].double()
    for seed in seeds:
        weight = torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        layer = LAYERS[norm]().double()
        before = layer(x @ weight.T)
        new_weight, new_x = CHANGES[change](weight, x)
        after = layer(new_x @ new_weight.T)
        rows.append({"seed": seed, "moved": float(((after - before).abs().max() / before.abs().max()).detach())})
    return rows


def attribution(seeds: list[int], *, norm: str, steps: int = 200) -> list[Row]:
    """Sum over pixels of gradient × input, for the logit of the right class, over that logit; after training.

    A perceptron with ReLU and no biases. Where the sum is the logit, the attribution is complete; ``completeness`` is
    Σ x·∇f / Σ f over test images, and ``remainder`` the part of it that is left when the biases that batch norm has in
    evaluation are counted as inputs, too.
    """
    from torch.nn import functional as F

    images, labels, test_x, test_y = (t.double() if t.is_floating_point() else t for t in data.digits())
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)

        def linear(num_in: int, num_out: int) -> nn.Module:
            return nn.Linear(num_in, num_out, bias=False)

        net = nn.Sequential(
            linear(64, WIDTH),
            LAYERS[norm](),
            nn.ReLU(),
            linear(WIDTH, WIDTH),
            LAYERS[norm](),
            nn.ReLU(),
            linear(WIDTH, 10),
        ).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        order = data.orders(data.NUM_TRAIN, [seed], 7)[:steps, :, 0]
        for chosen in order:
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        net.eval()
        x = test_x.clone().requires_grad_()
        constants: list[Tensor] = []
        handles = [layer.register_forward_hook(_shift(constants)) for layer in net if _has_constant(layer)]
        logit = net(x).gather(1, test_y[:, None]).sum()
        for handle in handles:
            handle.remove()
        by_x, *by_constants = torch.autograd.grad(logit, [x, *constants])
        explained = (x * by_x).sum()
        rest = sum((c * g).sum() for c, g in zip(constants, by_constants, strict=True))
        rows.append(
            {
                "seed": seed,
                "completeness": float((explained / logit).detach()),
                "remainder": float(((logit - explained - rest).abs() / logit.abs()).detach()),
                "error": 100 * float((net(test_x).argmax(1) != test_y).float().mean()),
            }
        )
    return rows


def _has_constant(layer: nn.Module) -> bool:
    """Whether a layer adds something in evaluation: a bias, or what batch norm subtracts."""
    return getattr(layer, "bias", None) is not None


def _shift(constants: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Replaces a layer's constant by a leaf of the same value, so that the gradient knows it."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        value = layer.bias
        if getattr(layer, "running_mean", None) is not None:
            value = value - layer.running_mean * layer.weight / (layer.running_var + layer.eps).sqrt()
        constant = value.detach().clone().requires_grad_()
        constants.append(constant)
        return output - value.detach() + constant

    return hook
