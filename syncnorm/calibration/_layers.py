"""What the calibrations share: the batch norms of a model, the model within DDP, the tensor within a batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from syncnorm.core.moments import Moments
from syncnorm.modules import SyncStatistics

__all__ = ["batch_norms", "call_with_first_tensor", "evaluated_by", "first_tensor", "unwrap", "without_broadcast"]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm in ``model`` by name, ours, torch's and their subclasses; a shared one once.

    Raises:
        ValueError: If one is lazy and has not seen its first input.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, layer in layers.items():
        if any(is_lazy(t) for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None):
            raise ValueError(f"{name} ({type(layer).__name__}) is lazy and has no shape yet. Run the model once first.")
    return layers


def evaluated_by(layer: nn.Module, moments: Moments, var: Tensor) -> tuple[Tensor, Tensor]:
    """The running statistics by which ``layer`` evaluates like a batch of these moments: their mean, and ``var`` of theirs.

    Moving average batch norm does not centre: its running mean is a constant, and its other the mean square about that.
    """
    if not isinstance(layer, SyncStatistics) or layer.family != "moving_average_batch_norm":
        return moments.mean, var
    assert layer.running_mean is not None
    centre = layer.running_mean.to(moments.mean)
    return centre, moments.var + (moments.mean - centre).square()


def unwrap(model: nn.Module) -> nn.Module:
    """The model within DDP, whose own forward broadcasts buffers and so would wait for ranks with fewer batches.

    ``AveragedModel`` hides DDP and the training flag of what it has copied, and adds nothing to its forward.
    """
    while isinstance(model, (DistributedDataParallel, AveragedModel)):
        model = model.module
    return model


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
    """Within, no DDP in ``model``, as under Fabric's wrapper, broadcasts its buffers: a rank may call the model alone."""
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel) and m.broadcast_buffers]
    for wrapper in wrappers:
        wrapper.broadcast_buffers = False
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.broadcast_buffers = True


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor within nested tuples, lists, mappings and dataclasses."""
    if isinstance(batch, Tensor):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in fields(batch)}
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def call_with_first_tensor(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with the tensor that ``batch`` is or begins with, on the model's device."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected batches that are tensors or tuples that begin with one, got {type(x).__name__}. Say how the model "
            "is called: forward=lambda model, batch: model(**batch)."
        )
    parameter = next(model.parameters(), None)
    return model(x if parameter is None else x.to(parameter.device))


Forward = Callable[[nn.Module, Any], Any]
"""How a model is called with a batch."""
