"""The whole batch in one process with torch's own layer: what every split over ranks must equal."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def torchs(kind: type[nn.Module], *args: Any, bias: bool = True, **options: Any) -> nn.Module:
    """A batch norm of torch, without a bias also where torch is too old (2.11) to be asked for that."""
    layer = kind(*args, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def whole_batch(
    shape: Sequence[int], *, offset: float = 0.5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """An input and a weight for the loss, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + offset
    return x.to(dtype), torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def my_slice(splits: Sequence[int]) -> slice:
    """The samples of this rank."""
    start = sum(splits[: dist.get_rank()])
    return slice(start, start + splits[dist.get_rank()])


def randomise_affine(layer: nn.Module) -> None:
    """Weights of both signs and away from 1: a layer that forgets them fails."""
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def results(layer: nn.Module, x: Tensor, loss_weight: Tensor, *, second_order: bool = True) -> dict[str, Tensor]:
    """Output, gradients, gradients of a gradient penalty and buffers of one training step.

    Names that start with ``sum:`` are per-rank shares, whose sum over ranks is the whole batch's.
    """
    x = x.detach().requires_grad_()
    parameters = dict(layer.named_parameters())
    y = layer(x)
    loss = (y.pow(3) * loss_weight).sum()
    inputs = [x, *parameters.values()]
    gradients = torch.autograd.grad(loss, inputs, create_graph=second_order)
    out = {"y": y.detach(), "dx": gradients[0].detach()}
    out |= {f"sum:d{name}": g.detach() for name, g in zip(parameters, gradients[1:], strict=True)}
    if second_order:
        penalty = torch.autograd.grad(gradients[0].square().sum(), inputs, allow_unused=True)
        out["ddx"] = penalty[0]
        out |= {f"sum:dd{name}": g for name, g in zip(parameters, penalty[1:], strict=True) if g is not None}
    return out | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def errors(mine: dict[str, Tensor], whole: dict[str, Tensor], part: slice) -> dict[str, float]:
    """Largest error of each result of this rank, relative to the largest value of the whole batch's."""
    out = {}
    for name, exact in whole.items():
        value = mine[name]
        if name.startswith("sum:"):
            value = value.double().clone()
            dist.all_reduce(value)
        elif name in ("y", "dx", "ddx"):
            exact = exact[part]
        scale = max(float(whole[name].abs().max()), 1.0)
        assert value.shape == exact.shape, (name, value.shape, exact.shape)
        out[name] = float((value.double() - exact.double()).abs().max()) / scale if value.numel() else 0.0
    return out


def step_errors(
    layer: nn.Module, whole_layer: nn.Module, shape: Sequence[int], splits: Sequence[int], **options: Any
) -> dict[str, float]:
    """Errors of one training step of ``layer`` on this rank's part against ``whole_layer`` on everything."""
    randomise_affine(whole_layer)
    layer.load_state_dict(whole_layer.state_dict())
    x, loss_weight = whole_batch(shape)
    part = my_slice(splits)
    whole = results(whole_layer, x, loss_weight, **options)
    return errors(results(layer, x[part], loss_weight[part], **options), whole, part)


def count_exchanges(graph: torch.fx.Graph) -> int:
    """Sums over ranks in a graph: functional collectives, and our own operator, which functionalisation wraps."""
    called = [node.args[0] if "auto_functionalized" in str(node.target) else node.target for node in graph.nodes]
    return sum("all_reduce" in str(what) for what in called)
