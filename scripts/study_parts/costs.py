"""What norms cost: time, collectives, state; and what is left of them in an exported model."""

import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from syncnorm import modules
from syncnorm.testing import count_collectives, run_ranks

Row = dict[str, Any]

C = 64
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "SyncBN": lambda: modules.SyncBatchNorm2d(C),
    "BatchRenorm": lambda: modules.BatchRenorm2d(C),
    "MABN": lambda: modules.MovingAverageBatchNorm2d(C),
    "FrozenBatchNorm": lambda: modules.FrozenBatchNorm2d(C),
    "SwitchableNorm": lambda: modules.SwitchableNorm2d(C),
    "BatchInstanceNorm": lambda: modules.BatchInstanceNorm2d(C),
    "GroupNorm": lambda: modules.GroupNorm(C, 8),
    "LayerNorm": lambda: modules.GroupNorm(C, 1),
    "InstanceNorm": lambda: modules.InstanceNorm2d(C, affine=True),
    "RMSNorm": lambda: modules.RMSNorm(C, channel_dim=1),
    "FilterResponseNorm": lambda: modules.FilterResponseNorm(C),
    "EvoNormS0": lambda: modules.EvoNormS0(C, 8),
    "EvoNormB0": lambda: modules.EvoNormB0(C),
    "DynamicTanh": lambda: modules.DynamicTanh(C, channel_dim=1),
    "none": nn.Identity,
}
WIDE = 1024
ROWS: dict[str, Callable[[], nn.Module]] = {
    "nn.LayerNorm, rows": lambda: nn.LayerNorm(WIDE),
    "nn.RMSNorm, rows": lambda: nn.RMSNorm(WIDE),
    "LayerNorm, rows": lambda: modules.LayerNorm(WIDE),
    "RMSNorm, rows": lambda: modules.RMSNorm(WIDE),
}


def overhead(seeds: list[int], *, layer: str) -> list[Row]:
    """Forward and backward, relative to torch's batch norm on maps and layer norm on rows; collectives on two ranks.

    Maps of (16, 64, 28, 28), rows of (784, 1024). A seed is a repetition: the median of nine pairs, in turn, of which the
    processor's time is taken, as the machine may be busy.
    """
    reference = "nn.LayerNorm, rows" if layer in ROWS else "nn.BatchNorm2d"
    every = LAYERS | ROWS
    x = torch.randn(784, WIDE) if layer in ROWS else torch.randn(16, C, 28, 28)
    x.requires_grad_()
    grad = torch.randn_like(x)

    def step(made: nn.Module) -> Callable[[], None]:
        def work() -> None:
            made(x).backward(grad)
            x.grad = None

        return work

    made = every[layer]()
    works = [step(made), step(every[reference]())]
    for work in works * 3:
        work()
    ratios = []
    for _ in seeds:
        pairs = [[_seconds(work, 1, time.process_time) for work in works] for _ in range(9)]
        ratios.append(statistics.median(mine / theirs for mine, theirs in pairs))
    counted = run_ranks(collectives, 2, layer, timeout=120)[0] if layer in LAYERS else 0
    width = WIDE if layer in ROWS else C
    shared = {
        "collectives": counted,
        "buffers_per_channel": sum(b.numel() for b in made.buffers()) / width,
        "parameters_per_channel": sum(p.numel() for p in made.parameters()) / width,
    }
    return [{"seed": seed, "relative": ratio} | shared for seed, ratio in zip(seeds, ratios, strict=True)]


def _seconds(work: Callable[[], None], times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    found = []
    for _ in range(times):
        began = clock()
        work()
        found.append(clock() - began)
    return statistics.median(found)


def collectives(layer: str) -> int:
    """Of one forward and backward, after a first that makes acquaintance."""
    made = LAYERS[layer]()
    x = torch.randn(2, C, 4, 4, requires_grad=True)
    made(x).sum().backward()
    with count_collectives() as counts:
        made(x).sum().backward()
    return sum(counts.values())


def deployment(seeds: list[int], *, norm: str) -> list[Row]:
    """Three convolutions with a norm, trained a little, folded if that is possible, and as ONNX.

    ``fold_error`` is the largest difference of outputs after folding the norm into the convolution, over the largest
    output; empty where no constant scale and shift exist. ``onnx_nodes`` are of the exported graph, folded if possible;
    ``onnx_error`` is onnxruntime against torch, ``onnx_ms`` its median processor time for 8 images of 32×32 on one thread.
    """
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for num_in in (3, C, C):
            made = LAYERS[norm]()
            layers += [nn.Conv2d(num_in, C, 3, padding=1), made]
            layers += [] if norm.startswith("EvoNorm") else [nn.ReLU()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            loss = net(torch.randn(8, 3, 16, 16) * 2 + 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        x = torch.randn(8, 3, 32, 32)
        row: Row = {"seed": seed}
        used = net
        if getattr(net[1], "running_mean", None) is not None and not isinstance(net[1], _PER_SAMPLE):
            used = _fold(net)
            with torch.no_grad():
                row["fold_error"] = float((used(x) - net(x)).abs().max() / net(x).abs().max())
        rows.append(row | _as_onnx(used, x))
    return rows


# Their scale depends on the sample, in evaluation too.
_PER_SAMPLE = (modules.SwitchableNorm2d, modules.BatchInstanceNorm2d, modules.EvoNormB0)


def _fold(net: nn.Sequential) -> nn.Sequential:
    layers, folded = list(copy.deepcopy(net)), []
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d):
            folded.append(fuse_conv_bn_eval(layer, following))
        elif getattr(layer, "running_mean", None) is None:
            folded.append(layer)
    return nn.Sequential(*folded).eval()


def _as_onnx(net: nn.Module, x: Tensor) -> Row:
    import onnx
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder, "net.onnx"))
        torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
        nodes = len(onnx.load(path).graph.node)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        found = torch.from_numpy(session.run(None, feed)[0])
        ms = 1e3 * _seconds(lambda: session.run(None, feed), 10, time.process_time)
        expected = net(x)
    return {"onnx_nodes": nodes, "onnx_error": float((found - expected).abs().max()), "onnx_ms": ms}
