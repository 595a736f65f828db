"""What ``fully_shard`` (FSDP2) does to a module's class: it gives it one of its own, ``(FSDPModule, original)``.

A class swap has to keep that in front, or the module is no longer FSDP's.
"""

from torch import nn

__all__ = ["is_sharded", "sharded_like"]

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def is_sharded(cls: type[nn.Module]) -> bool:
    """Whether ``fully_shard`` made ``cls``."""
    return len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule"


def sharded_like(cls: type[nn.Module], like: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with what ``fully_shard`` put in front of ``like``; ``cls`` itself if that was nothing."""
    if is_sharded(cls) or not is_sharded(like):
        return cls
    if (cls, like) not in _made:
        own = {name: like.__dict__[name] for name in ("__deepcopy__", "__module__") if name in like.__dict__}
        _made[cls, like] = type(f"FSDP{cls.__name__}", (like.__bases__[0], cls), own)
    return _made[cls, like]
