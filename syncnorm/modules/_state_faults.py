"""What a parameter or buffer of a norm can hold and what it cannot. Torch loads anything that has the shape."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["entry_fault", "state_faults"]

_NOT_NEGATIVE = ("running_var", "num_batches_tracked", "var", "m2", "count")
_SHOWN = 8


def state_faults(layer: nn.Module, state: Mapping[str, object]) -> dict[str, str]:
    """What is wrong with the entries of ``state`` that ``layer`` itself would load, by name; its submodules are not looked at.

    Args:
        layer: Says which entries there are, and of which shape.
        state: By the layer's own names, such as ``"running_var"``; what is not in it is not missed.
    """
    own = {**layer._parameters, **layer._buffers}
    faults = {
        name: entry_fault(name, state[name], like) for name, like in own.items() if like is not None and name in state
    }
    return {name: fault for name, fault in faults.items() if fault is not None}


@torch.no_grad()
def entry_fault(name: str, value: object, like: Tensor) -> str | None:
    """Why ``value`` cannot be the parameter or buffer ``name`` of a norm; None if it can.

    Args:
        name: The layer's own name for it.
        value: What came.
        like: What the layer has, which must be of the same shape.
    """
    if not isinstance(value, Tensor):
        return f"must be a tensor, is {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return f"must be a plain dense tensor, is {value.layout}"
    if not is_lazy(like) and value.shape != like.shape and value.numel() + like.numel() > 2:  # torch takes [1] for []
        return f"must have shape {list(like.shape)}, has {list(value.shape)}"
    counts = name.startswith("num_batches_tracked")
    if value.is_floating_point() == counts or value.is_complex() or value.dtype == torch.bool:
        kind = "an integer" if counts else "floating point"
        return f"must be {kind}, is {str(value.dtype).removeprefix('torch.')}"
    if value.is_meta or hasattr(value, "fake_mode"):
        return None
    value = value.to_local() if hasattr(value, "to_local") else value  # a sharded one: what this rank holds of it
    wide = value.detach().flatten().double()
    broken = ~wide.isfinite()
    if broken.any():
        return f"is not finite in {_channels(wide, broken)}"
    if name.startswith(_NOT_NEGATIVE) and (wide < 0).any():
        return f"is negative in {_channels(wide, wide < 0)}"
    return None


def _channels(values: Tensor, where: Tensor) -> str:
    """``channels [1, 3] (nan, -inf)``, the first few of many."""
    if values.numel() == 1:
        return f"its one value ({values.item():g})"
    channels = where.nonzero().flatten().tolist()
    shown = ", ".join(f"{value:g}" for value in values[channels[:_SHOWN]].tolist())
    more = f" and {len(channels) - _SHOWN} more" if len(channels) > _SHOWN else ""
    return f"channel{'s' * (len(channels) > 1)} {channels[:_SHOWN]}{more} of {values.numel()} ({shown})"
