"""Base of the modules outside the batch norm family that meet other ranks: their group, and buffers that stay wide."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import ParamSpec, Self

from syncnorm.distributed.groups import LOCAL, Group, GroupSpec, group_spec, resolve
from syncnorm.errors import SyncNormError

__all__ = ["OverRanks"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class OverRanks(nn.Module):
    """A module that shares statistics over the ranks of a group, which it remembers as plain data.

    Args:
        process_group: Which ranks share statistics, as in :class:`syncnorm.SyncBatchNorm`.
        *args: For the next class, where this is not the only base.
        **kwargs: Likewise.
    """

    too_narrow: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16, torch.float32)
    """What buffers are never cast to, whatever happens to the model around them."""

    _group_spec: GroupSpec
    _sync: bool
    _synced_over: int
    _tracks: bool  # False within no_stats_update

    def __init__(self, process_group: object = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_spec, self._sync, self._synced_over = group_spec(process_group), True, 0
        self._tracks = True

    @property
    def process_group(self) -> str | int | GroupSpec:
        """Which ranks share statistics: ``"world"``, ``"node"``, ranks per group, or a remembered process group."""
        spec = self._group_spec
        if spec.kind == "size":
            return spec.size
        return spec if spec.kind in ("named", "outside") else spec.kind

    @process_group.setter
    def process_group(self, value: object) -> None:
        self._group_spec, self._synced_over = group_spec(value), 0

    def _group(self) -> Group:
        if not self._sync:
            return LOCAL
        group: Group = resolve(self._group_spec)
        if torch.compiler.is_compiling():
            return group
        if not group.name and self._synced_over > 1:
            raise SyncNormError(
                f"{type(self).__name__} met {self._synced_over} ranks before and now there is no process group. Initialise "
                "it again, or say that one process is meant: `with syncnorm.disabled(module):`."
            )
        if self._synced_over != group.size:
            self._synced_over = group.size
        return group

    def _named(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``function``; an error of ours gets the name of this module."""
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError, SyncNormError) as error:
            raise type(error)(f"{type(self).__name__}: {error}") from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype and new.dtype in self.too_narrow:
                self._buffers[name] = torch.empty_like(new, dtype=old.dtype) if new.is_meta else old.to(new.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy may wake up in a process of its own: that it ran over ranks is not part of it.
        return {**self.__dict__, "_synced_over": 0}
