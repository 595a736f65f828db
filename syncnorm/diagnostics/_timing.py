"""How anything here is timed: interleaved rounds and paired ratios, because the machine is rarely quiet."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from syncnorm.distributed.groups import LOCAL
from syncnorm.errors import SyncNormError
from syncnorm.functional import sync_batch_norm
from syncnorm.kernels import objections

__all__ = ["Ratio", "Times", "interleave", "refuse_if_wrong", "serving", "spread", "step", "tensor", "walk"]

Layer = Callable[..., Tensor]
Times = dict[str, list[float]]


class Ratio(NamedTuple):
    """Median of paired ratios, and between which values the middle half of them lies."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 2) -> str:
        """``0.49 [0.47–0.50]``."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}–{self.high:.{digits}f}]"


def interleave(
    cases: Mapping[str, Callable[[], object]], rounds: int, advance: Callable[[str], None] | None = None
) -> Times:
    """Time every case once a round, after two rounds of warm-up.

    Args:
        cases: What to call, by name.
        rounds: How often, at least 2.
        advance: Called after every round.

    Returns:
        Seconds per call. On one thread its own CPU time, which other processes do not lengthen.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: Times = {name: [] for name in cases}
    for round_number in range(rounds + 2):
        for name, run in cases.items():
            start = clock()
            run()
            if round_number >= 2:
                times[name].append(clock() - start)
        if advance is not None:
            advance("")
    return times


def spread(times: Times, ours: str, theirs: str) -> Ratio:
    """Seconds of ``ours`` relative to those of ``theirs``."""
    return Ratio(*statistics.quantiles((b / a for a, b in zip(times[theirs], times[ours], strict=True)), n=4))


def tensor(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Random data: constant tensors flatter a memory-bound kernel."""
    return torch.randn(shape).to(dtype).to(memory_format=memory_format)


def step(layer: Layer, x: Tensor, grad: Tensor, residual: Tensor | None = None) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward, giving output and input gradient."""
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual) if t is not None]

    def run() -> tuple[Tensor, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y = layer(*leaves)
        y.backward(grad)
        assert leaves[0].grad is not None
        return y.detach(), leaves[0].grad

    return run


def walk(channels: int, backend: str, **options: Any) -> Layer:
    """The synchronised path in a group of one, where the module itself may leave the work to torch."""
    layer = nn.BatchNorm2d(channels)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return sync_batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=True, momentum=layer.momentum,
            eps=layer.eps, num_batches_tracked=layer.num_batches_tracked, group=LOCAL, backend=backend, residual=residual,
            **options,
        )  # fmt: skip

    return run


def serving(dtype: torch.dtype, *, reference: bool = True) -> list[str]:
    """Backends that take an input of that dtype on this machine."""
    answers = objections(torch.empty(2, 2, 2, dtype=dtype))
    return [name for name, reason in answers.items() if reason is None and (reference or name != "reference")]


def refuse_if_wrong(theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], x: Tensor, grad: Tensor) -> None:
    """See that output and input gradient of a batch norm agree with float64 about as well as torch's do.

    Raises:
        SyncNormError: If not; a wrong layer is not timed.
    """
    leaf = x.double().requires_grad_()
    y = functional.batch_norm(leaf, None, None, None, None, True, 0.0, 1e-5)
    (dx,) = torch.autograd.grad(y, leaf, grad.double())
    for name, exact, a, b in zip(("output", "input gradient"), (y, dx), theirs, ours, strict=True):
        bound = 2 * (a - exact).abs().max() + 4 * torch.finfo(x.dtype).eps * exact.abs().max()
        if (b - exact).abs().max() > bound:
            raise SyncNormError(f"not timed: {name} is off by {(b - exact).abs().max():.2e}, allowed {bound:.2e}")
