"""State that came from somewhere else is looked at before it is used: torch loads a variance of -1 without a word."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm.conversion._layers import display, keeps_batch_statistics, walk
from syncnorm.conversion._plan import Plan
from syncnorm.conversion._replace import STATISTICS
from syncnorm.modules._state_faults import state_faults

__all__ = ["is_norm", "refuse_broken", "validate_state_dict"]

_TORCHS = (_InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm with parameters or buffers of its own: torch's, ours, or a batch norm's look-alike."""
    ours = any(cls.__module__.startswith("syncnorm.modules.") for cls in type(module).__mro__)
    return ours or keeps_batch_statistics(module) or isinstance(module, _TORCHS)


def validate_state_dict(model: nn.Module, state_dict: Mapping[str, object]) -> int:
    """Check what a state dict would put into the norms of a model. Loads nothing, changes nothing.

    ``load_state_dict`` takes whatever has the shape: a negative variance or counter, NaN, complex numbers. Of every
    parameter and buffer of a norm that is in the state dict, this asks that it is a real dense tensor of the layer's shape,
    finite, an integer where it is a counter and floating point elsewhere, and for variances and counters that it is not
    negative. Entries that are missing, unexpected or of other layers are not its concern.

    Read the file with ``torch.load(path, weights_only=True)``: no check can come before a pickle that runs code.

    Args:
        model: The model or layer that the state is for; wrappers such as DDP or ``torch.compile`` around either may differ.
        state_dict: As for ``model.load_state_dict``.

    Returns:
        Number of entries checked; 0 only for a model without norms or an empty state dict.

    Raises:
        ValueError: If an entry cannot be right, with its key and channels; or if no entry belongs to a norm of the model.
        TypeError: If ``model`` is no module or ``state_dict`` no mapping.

    Example:
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> syncnorm.validate_state_dict(layer, layer.state_dict())
        5
    """
    if not isinstance(model, nn.Module) or not isinstance(state_dict, Mapping):
        raise TypeError(
            "validate_state_dict takes an nn.Module and a mapping of names to tensors, got "
            f"{type(model).__name__} and {type(state_dict).__name__}."
        )
    seen: set[str] = set()
    faults: list[str] = []
    ours = ""
    for place in walk(model):
        if not is_norm(place.module):
            continue
        entries = [k for k, t in {**place.module._parameters, **place.module._buffers}.items() if t is not None]
        ours = ours or ".".join(filter(None, (place.name, *entries[:1])))
        for path in dict.fromkeys((place.name, place.short_name)):
            keys = {entry: f"{path}.{entry}" if path else entry for entry in entries}
            state = {entry: state_dict[key] for entry, key in keys.items() if key in state_dict and key not in seen}
            seen.update(keys[entry] for entry in state)
            faults += [f"  {keys[entry]} {fault}" for entry, fault in state_faults(place.module, state).items()]
    if faults:
        raise ValueError(
            f"{len(faults)} entries of the state dict are nothing that a norm of this model can have written; nothing was "
            "loaded:\n" + "\n".join(faults) + "\nDo not load it before you know where it comes from."
        )
    if ours and state_dict and not seen:
        raise ValueError(
            f"no entry of the state dict belongs to a norm of this model, which has entries like {ours!r}; its keys are like "
            f"{str(next(iter(state_dict)))!r}. "
            + (
                "It looks like a whole checkpoint: pass checkpoint['state_dict']."
                if isinstance(state_dict.get("state_dict"), Mapping)
                else "Strip or add the prefix, or pass the submodule that it is for."
            )
        )
    return len(seen)


def refuse_broken(made: Plan) -> None:
    """Refuse a conversion that would take over statistics which no training can have written.

    Raises:
        ValueError: With the layers, buffers and channels.
    """
    faults = []
    for entry in made.entries:
        if entry.action in ("swap", "replace"):
            module = entry._layer.module
            taken = [name for name in STATISTICS if name not in entry._verdict.dropped]
            found = state_faults(module, {name: b for name, b in module._buffers.items() if name in taken})
            faults += [f"  {display(entry.name)} ({entry.source}): {name} {fault}" for name, fault in found.items()]
    if faults:
        raise ValueError(
            f"convert(to={made.to!r}) would take over statistics that no training on finite numbers can have written; nothing "
            "was changed:\n" + "\n".join(faults) + "\nLoad a sound checkpoint, or start these statistics again with "
            "layer.reset_running_stats()."
        )
