"""Whole layers, forward and backward, against torch's and whoever else is installed."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu_parts.timing import medians, random
from torch import Tensor, nn
from torch.nn import functional as F

import syncnorm
from syncnorm.distributed.groups import LOCAL
from syncnorm.functional import sync_batch_norm

Block = Callable[..., Tensor]

IMAGES = [(64, 256, 56, 56), (16, 64, 224, 224), (32, 2048, 7, 7)]
ROWS = [(32768, 1024), (16384, 4096), (8192, 8192), (4096, 16384)]


class Blocks(NamedTuple):
    """What is compared: blocks by provider, how many inputs they take, and the modules whose gradients all of them owe."""

    by_provider: dict[str, Block]
    inputs: int
    modules: list[nn.Module]


def run(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Rows: layer, shape, layout, dtype, provider, µs of forward and backward, and how many times ours that is."""
    for compiled in (False, True):  # what takes Inductor seconds to make comes last
        dtypes = [torch.float32] if dry else [torch.bfloat16, torch.float32]
        for shape in [(2, 64, 4, 4)] if dry else IMAGES:
            for channels_last in (False, True):
                for dtype in dtypes:
                    labels = {"shape": str(shape), "layout": "NHWC" if channels_last else "NCHW"}
                    inputs = [random(shape, dtype, device, channels_last) for _ in range(3)]
                    for layer, blocks in image_blocks(shape[1], dtype, device, dry).items():
                        yield from _compared(layer, blocks, compiled, inputs, device, labels)
        for shape in [(4, 64)] if dry else ROWS:
            labels = {"shape": str(shape), "layout": "rows"}
            inputs = [random(shape, dtypes[0], device) for _ in range(3)]
            for layer, blocks in row_blocks(shape[1], dtypes[0], device, dry).items():
                yield from _compared(layer, blocks, compiled, inputs, device, labels)


def image_blocks(channels: int, dtype: torch.dtype, device: str, dry: bool) -> dict[str, Blocks]:
    """Blocks by layer."""
    theirs, fused = nn.BatchNorm2d(channels, device=device), nn.BatchNorm2d(channels, device=device)
    group = nn.GroupNorm(32, channels, device=device, dtype=dtype)  # torch's refuses parameters of another dtype
    silu = syncnorm.modules.GroupNorm(channels, 32, activation="silu", backend="triton").to(device, dtype)
    compiled = _compiled(dry)
    batch = {
        "ours": lambda x: _walk(theirs, x),
        "nn.BatchNorm2d": theirs,
        "nn.SyncBatchNorm's kernels": lambda x: _TorchSync.apply(x, theirs.weight, theirs.bias, theirs),
        "torch.compile(nn.BatchNorm2d)": compiled(theirs),
    }
    added = {
        "ours": lambda x, r: _walk(fused, x, "relu", r),
        "nn.BatchNorm2d, add, relu": lambda x, r: F.relu(fused(x) + r),
        "torch.compile(the same)": compiled(lambda x, r: F.relu(fused(x) + r)),
        "torch.compile(ours)": compiled(lambda x, r: _walk(fused, x, "relu", r, "auto")),
    }
    groups = {
        "ours": silu,
        "F.group_norm, silu": lambda x: F.silu(group(x)),
        "torch.compile(the same)": compiled(lambda x: F.silu(group(x))),
    }
    return {
        "BatchNorm": Blocks(batch, 1, [theirs]),
        "BatchNorm, add, ReLU": Blocks(added, 2, [fused]),
        "GroupNorm 32, SiLU": Blocks(groups, 1, [group, silu]),
    }


def row_blocks(features: int, dtype: torch.dtype, device: str, dry: bool) -> dict[str, Blocks]:
    """As :func:`image_blocks`, for rows."""
    compiled = _compiled(dry)
    layer = nn.LayerNorm(features, device=device, dtype=dtype)
    rms = nn.RMSNorm(features, eps=1e-5, device=device, dtype=dtype)
    our_layer = syncnorm.modules.LayerNorm(features, backend="triton").to(device, dtype)
    our_rms = syncnorm.modules.RMSNorm(features, eps=1e-5, backend="triton").to(device, dtype)
    layers = {"ours": our_layer, "F.layer_norm": layer, "torch.compile(the same)": compiled(layer)}
    norms = {"ours": our_rms, "F.rms_norm": rms, "torch.compile(the same)": compiled(rms)}
    added = {
        "ours": lambda x, r: sum(our_rms(x, residual=r)),
        "add, F.rms_norm": lambda x, r: rms(x + r) + (x + r),
        "torch.compile(the same)": compiled(lambda x, r: rms(x + r) + (x + r)),
    }
    return {
        "LayerNorm": Blocks(layers | _peers("LayerNorm", layer), 1, [layer, our_layer]),
        "RMSNorm": Blocks(norms | _peers("RMSNorm", rms), 1, [rms, our_rms]),
        "RMSNorm of a sum, and the sum": Blocks(added, 2, [rms, our_rms]),
    }


def _compared(
    layer: str, blocks: Blocks, compiled: bool, inputs: list[Tensor], device: str, labels: dict[str, str]
) -> Iterator[dict[str, Any]]:
    leaves, grad = [x.detach().requires_grad_() for x in inputs[: blocks.inputs]], inputs[-1]
    wanted = [*leaves, *(p for module in blocks.modules for p in module.parameters())]

    def step(block: Block) -> Callable[[], object]:
        return lambda: torch.autograd.grad(block(*leaves), wanted, grad, allow_unused=True)

    torch._dynamo.reset()  # or the ninth version of a block is refused: it counts as another recompilation of the first
    chosen = {n: b for n, b in blocks.by_provider.items() if n == "ours" or n.startswith("torch.compile") == compiled}
    times = medians({name: step(block) for name, block in chosen.items()}, device)
    for name, seconds in times.items():
        yield {
            "layer": layer, **labels, "dtype": str(grad.dtype).removeprefix("torch."), "provider": name,
            "µs": round(seconds * 1e6, 1), "times ours": round(seconds / times["ours"], 2) if "ours" in times else None,
        }  # fmt: skip


def _walk(
    layer: nn.BatchNorm2d,
    x: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "triton",
) -> Tensor:
    """The synchronised path in a group of one, where the module itself would leave the work to torch."""
    return sync_batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=True, momentum=layer.momentum,
        eps=layer.eps, num_batches_tracked=layer.num_batches_tracked, group=LOCAL, backend=backend,
        activation=activation, residual=residual,
    )  # fmt: skip


class _TorchSync(torch.autograd.Function):
    """What ``nn.SyncBatchNorm`` computes on each rank; its module leaves a group of one to cuDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        mean, invstd = torch.batch_norm_stats(x, layer.eps)
        count = torch.full((1,), x.numel() // x.size(1), dtype=mean.dtype, device=x.device)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, mean[None], invstd[None], layer.running_mean, layer.running_var, 0.1, layer.eps, count
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, invstd, count.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, layer.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, invstd, count = ctx.saved_tensors
        total, products, dweight, dbias = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, True, True, True
        )
        dx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, products, count)
        return dx, dweight, dbias, None


def _compiled(dry: bool) -> Callable[[Block], Block]:
    return (lambda block: block) if dry else (lambda block: torch.compile(block, fullgraph=True, dynamic=False))


def _peers(kind: str, like: Any) -> dict[str, Block]:
    """Liger-Kernel and quack, where they are installed."""
    found: dict[str, Block] = {}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        if kind == "LayerNorm":
            found["Liger"] = lambda x: LigerLayerNormFunction.apply(x, like.weight, like.bias, 1e-5)
        else:
            found["Liger"] = lambda x: LigerRMSNormFunction.apply(x, like.weight, 1e-5)
    except ImportError:
        pass
    try:
        if kind == "RMSNorm":
            from quack import rmsnorm

            found["quack"] = lambda x: rmsnorm(x, like.weight, eps=1e-5)
    except ImportError:
        pass
    return found
