"""One training step of a model on its share of a batch, and everything that is to be compared afterwards.

Runs in processes of its own: the reference as a group of one, the converted model once per rank.
"""

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.conversion import convert
from syncnorm.conversion._layers import keeps_batch_statistics, origin_of
from syncnorm.conversion._revert import without_synchronisation
from syncnorm.diagnostics._trees import call, leaves, map_tensors

__all__ = ["Job", "Measured", "is_random", "measure"]

# Of every layer's output this many values per sample are kept: enough to see a wrong statistic, little enough to carry.
_KEPT = 4096


@dataclass(frozen=True)
class Job:
    """What a process has to measure.

    Attributes:
        folder: Where the model, its weights and the input are.
        to: Target of the conversion.
        conversion: Its other arguments.
        dtype: Of the computation.
        batch: Samples of all ranks, N.
        splits: Samples per rank.
        reference: Whether this is the one process that the ranks are compared to.
        outputs: Outputs that carry the batch, as the reference found them.
        nudge: If not 0, a seed by which the last bits of parameters and input are changed.
    """

    folder: str
    to: str
    conversion: dict[str, Any]
    dtype: torch.dtype
    batch: int
    splits: tuple[int, ...]
    reference: bool
    outputs: tuple[str, ...]
    nudge: int = 0


@dataclass
class Measured:
    """What one process saw. Batched tensors have this process's samples in dim 0.

    Attributes:
        outputs: By path.
        input_grads: By path.
        param_grads: By qualified name.
        buffers: By qualified name.
        layers: Output of each call of each layer, in order; ``[n, values]``.
        shapes: Of all floating-point outputs.
        random: Outputs that changed between two runs on the same input.
    """

    outputs: dict[str, Tensor]
    input_grads: dict[str, Tensor | None]
    param_grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    layers: list[tuple[str, Tensor]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    random: list[str] = field(default_factory=list)


def is_random(module: nn.Module) -> bool:
    """Whether ``module`` draws random numbers when training: dropout and stochastic depth, by torch or by name."""
    name = type(module).__name__.lower()
    own = not any(True for _ in module.children())
    return own and any(word in name for word in ("dropout", "droppath", "stochasticdepth", "rrelu"))


def measure(job: Job) -> Measured:
    """One forward and backward of the model on this rank's shard."""
    rank = 0 if job.reference else int(os.environ["RANK"])
    start = sum(job.splits[:rank])
    shard = slice(start, start + job.splits[rank])
    input = pickle.loads((Path(job.folder) / "input.pickle").read_bytes())  # written by verify a moment ago
    model = _build(job)
    given = map_tensors(lambda tensor: _prepare(tensor, job, shard), input)
    if job.nudge:
        _nudge([*model.parameters(), *(tensor for _, tensor in leaves(given))], job.nudge)
    layers: list[tuple[str, Tensor]] = []
    torch.manual_seed(2)
    with _recording(model, job.splits[rank], layers):
        found = _floating(call(model, given))
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    names, random = (job.outputs, []) if job.outputs else _batched_outputs(job, input, found)
    outputs = {name: found[name] for name in names}
    for name, output in outputs.items():
        if output.size(0) != job.splits[rank]:
            raise ValueError(f"output {name!r} is {list(output.shape)} for {job.splits[rank]} samples on rank {rank}.")
    if outputs:
        _loss(outputs, job.batch, shard).backward()
    batched = {name: t for name, t in leaves(given) if t.requires_grad}
    return Measured(
        outputs={name: output.detach() for name, output in outputs.items()},
        input_grads={name or "input": tensor.grad for name, tensor in batched.items()},
        param_grads={name: parameter.grad for name, parameter in model.named_parameters()},
        buffers={name: b.detach() for name, b in model.named_buffers() if not name.endswith("_pending")},
        layers=layers,
        shapes=shapes,
        random=random,
    )


def _build(job: Job) -> nn.Module:
    """The model with the given weights, as this process has to run it."""
    torch.manual_seed(0)  # the same in every process, for what a state dict does not carry
    made = pickle.loads((Path(job.folder) / "model.pickle").read_bytes())  # written by verify a moment ago
    model: nn.Module = made if isinstance(made, nn.Module) else made()
    model.load_state_dict(torch.load(Path(job.folder) / "weights.pt", map_location="cpu", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verify has told already what convert would leave
        if job.reference:
            without_synchronisation(model)
        if not job.reference or job.to != "sync_batch_norm":
            model = convert(model, job.to, **job.conversion)
    model.to("cpu", job.dtype)
    if not model.training:
        model.train()
    for module in model.modules():
        if is_random(module):
            module.eval()
    return model


def _prepare(tensor: Tensor, job: Job, shard: slice) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.to(job.dtype)
    if not tensor.dim() or tensor.size(0) != job.batch:
        return tensor
    return tensor[shard].clone().requires_grad_(tensor.is_floating_point())


@torch.no_grad()
def _nudge(tensors: list[Tensor], seed: int) -> None:
    """Move every value by its last bit, up or down: what changes by that is rounding."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.dtype) * 2 - 1
            tensor.mul_(1 + torch.finfo(tensor.dtype).eps * signs)


@contextmanager
def _recording(model: nn.Module, num_samples: int, layers: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Keep the output of every normalisation layer and every module without children, call by call."""
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.children()) and not (keeps_batch_statistics(module) or origin_of(module)):
            continue

        def keep(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                values = _some_values(output.detach(), num_samples)
                if values is not None:
                    layers.append((name, values))

        handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _some_values(output: Tensor, num_samples: int) -> Tensor | None:
    if not output.dim() or (output.size(0) % num_samples if num_samples else output.numel()):
        return None
    if not num_samples:
        return output.new_empty(0)
    rows = output.reshape(num_samples, -1)
    if rows.size(1) <= _KEPT:
        return rows.clone()
    chosen = torch.randperm(rows.size(1), generator=torch.Generator().manual_seed(rows.size(1)))[:_KEPT]
    return rows[:, chosen]


def _floating(output: Any) -> dict[str, Tensor]:
    return {name or "output": tensor for name, tensor in leaves(output) if tensor.is_floating_point()}


def _batched_outputs(job: Job, input: Any, found: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Outputs that have one row per sample, told by giving one sample more; and those that two runs disagree on."""
    all_samples = slice(0, job.batch)
    with torch.no_grad():
        torch.manual_seed(1)
        again = _floating(call(_build(job), map_tensors(lambda t: _prepare(t, job, all_samples).detach(), input)))
        more = map_tensors(lambda t: _one_more(_prepare(t, job, all_samples).detach(), job.batch), input)
        larger = _floating(call(_build(job), more))
    batched = [
        name
        for name, tensor in found.items()
        if tensor.dim()
        and tensor.requires_grad
        and tensor.size(0) == job.batch
        and larger[name].size(0) == job.batch + 1
    ]
    random = [name for name in batched if not torch.allclose(found[name], again[name], rtol=1e-4, atol=1e-6)]
    return batched, random


def _one_more(tensor: Tensor, batch: int) -> Tensor:
    return torch.cat([tensor, tensor[:1]]) if tensor.dim() and tensor.size(0) == batch else tensor


def _loss(outputs: dict[str, Tensor], batch: int, shard: slice) -> Tensor:
    """Σ output·c with c random and fixed for the whole batch; ranks take their rows and add up to the whole."""
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(index)
        weights = torch.randn(batch, *output.shape[1:], generator=generator, dtype=torch.float64)
        total = total + (output * weights[shard].to(output.dtype)).sum()
    return total
