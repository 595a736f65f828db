"""Tier: gpu. A training step of a layer on one device: captured, compiled, never waiting for the host, twice the same bits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.kernels import BACKENDS, choose
from syncnorm.kernels.rows import ROW_BACKENDS, choose_rows
from tests.triton_cases import DEVICE, INTERPRETED, randn

C = 64
# By name: left to "auto", a layer without peers leaves the work to torch.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: syncnorm.SyncBatchNorm2d(C, backend="triton"),
    "batch, cumulative": lambda: syncnorm.SyncBatchNorm2d(C, momentum=None, backend="triton"),
    "batch relu": lambda: syncnorm.SyncBatchNorm2d(C, activation="relu", backend="triton"),
    "batch renorm": lambda: syncnorm.modules.BatchRenorm2d(C, backend="triton"),
    "ghosts": lambda: syncnorm.modules.GhostBatchNorm2d(C, 2, backend="triton"),
    "layer": lambda: syncnorm.modules.LayerNorm(28, backend="triton"),
    "rms": lambda: syncnorm.modules.RMSNorm(28, backend="triton"),
    "group silu": lambda: syncnorm.modules.GroupNorm(C, 32, activation="silu", backend="triton"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_device = pytest.mark.skipif(INTERPRETED, reason="a CUDA device is needed, the interpreter will not do")
N = 2 if INTERPRETED else 16


def image(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return randn(N, C, 28, 28, dtype=dtype, seed=seed)


def trained(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Output, gradients and state of a step."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], g)
    return [y.detach(), *grads, *(b.clone() for b in layer.buffers())]


@on_device
def test_auto_takes_these_kernels_but_not_inside_a_compiled_graph() -> None:
    x = image()
    assert choose("auto", x) is BACKENDS["triton"]
    assert choose_rows("auto", x) is ROW_BACKENDS["triton"]
    said = "serves this input, taken"
    assert f"triton: {said}" in syncnorm.explain(syncnorm.SyncBatchNorm2d(C, momentum=None).to(DEVICE), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    x, g = image(dtype), image(dtype, 1)
    outcomes = [trained(LAYERS[name]().to(DEVICE), x, g) for _ in range(2)]
    for once, again in zip(*outcomes, strict=True):
        assert torch.equal(once, again)


@on_device
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    layer, x, g = LAYERS[name]().to(DEVICE), image(), image(seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # the first call compiles kernels
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x.requires_grad_()).backward(g)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_device
@pytest.mark.parametrize("name", LAYERS)
@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_a_captured_step_replays_as_the_eager_one(name: str) -> None:
    captured = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), LAYERS[name](), nn.Conv2d(C, 3, 1)).to(DEVICE)
    eager = copy.deepcopy(captured)
    batches = [randn(8, 3, 28, 28, dtype=torch.float32, seed=i) for i in range(6)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, foreach=True) for model in (captured, eager)]
    static = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in batches[:3]:
            static.copy_(x)
            step(captured, optimizers[0], static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizers[0], static)
    losses = [step(eager, optimizers[1], x) for x in batches]
    for x, expected in zip(batches[3:], losses[3:], strict=True):
        static.copy_(x)
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@on_device
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["batch", "group", "rms"])
def test_inductor_makes_one_graph(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = {
        "batch": lambda: syncnorm.SyncBatchNorm2d(C, activation="relu", momentum=None, backend=backend),
        "group": lambda: syncnorm.modules.GroupNorm(C, 32, activation="silu", backend=backend),
        "rms": lambda: syncnorm.modules.RMSNorm(28, eps=1e-5, backend=backend),
    }[kind]().to(DEVICE)
    x, g = image(), image(seed=1)
    eager = trained(copy.deepcopy(layer), x, g)
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True)
    for expected, value in zip(eager, trained(compiled, x, g), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@on_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains_with_statistics_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, C, 3), syncnorm.SyncBatchNorm2d(C, activation="relu", backend="triton"), nn.Conv2d(C, 1, 3)
    ).to(DEVICE)  # fmt: skip
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = randn(8, 3, 20, 20, dtype=torch.float32)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            y = model(x)
            loss = (y.float() - 1).square().mean()
        assert y.dtype == dtype and model[1].running_var.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0] / 2


@on_device
def test_a_fused_block_keeps_less_than_torchs() -> None:
    def kept(block: Callable[[Tensor, Tensor], Tensor]) -> int:
        x, r = image(torch.bfloat16).requires_grad_(), image(torch.bfloat16, 1).requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = block(x * 1, r * 1)  # inputs that the block alone keeps alive
        held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        y.sum().backward()
        return held

    fused = syncnorm.SyncBatchNorm2d(C, activation="relu", backend="triton").to(DEVICE)
    plain = nn.BatchNorm2d(C).to(DEVICE)
    ours = kept(lambda x, r: fused(x, residual=r))
    theirs = kept(lambda x, r: torch.relu(plain(x) + r))
    size = image(torch.bfloat16).numel() * 2
    # x and a bit an element (a sixteenth of bfloat16), and vectors; torch keeps x, as its ReLU keeps the output, not counted.
    assert ours <= size * (1 + 1 / 16) + 64 * 1024
    assert ours <= theirs + size / 16 + 64 * 1024
