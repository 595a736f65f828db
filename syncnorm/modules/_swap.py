"""How a layer of torch becomes one of the synchronised statistics family, and itself again: the class is swapped, in place.

A converted layer is the same object with another class. Parameters, buffers, hooks, names, optimizer and EMA references
and every alias stay; going back is another swap.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from syncnorm.core.activation import Activation
from syncnorm.distributed.collectives import find_group, group_ranks
from syncnorm.distributed.groups import GroupSpec, group_spec
from syncnorm.errors import SyncNormError
from syncnorm.functional._nonfinite import OnNonFinite, check_policy
from syncnorm.kernels import BACKENDS
from syncnorm.modules._sharded import sharded_like

__all__ = ["HALVES", "OURS", "SYNC_BATCH_NORMS_OWN", "TARGETS", "Swapped", "check_options", "register_swap"]

TARGETS: dict[type[nn.Module], type[Any]] = {}
"""Which class each exact type is swapped to."""

OURS = (
    "_activation", "_group_spec", "_narrow", "_origin", "_path", "_sync", "_synced_over", "_torch_group", "accumulate",
    "backend", "memory_efficient", "on_nonfinite",
)  # fmt: skip
"""Fields that a layer of torch has not."""

SYNC_BATCH_NORMS_OWN = ("memory_efficient", "on_nonfinite")
"""Fields that SyncBatchNorm alone has, of the whole family; ``accumulate`` beside them is 1 in the others."""

HALVES = (torch.float16, torch.bfloat16)

_WIDE = ("_pending", "_limits", "_clip_rate", "_squares", "_slopes")
"""Buffers that stay float64 whatever the model is cast to."""


class Swapped(_BatchNorm):
    """What a layer has beside torch's fields, and how it comes to them and loses them."""

    reverts_to: ClassVar[type[nn.Module]]
    family: ClassVar[str] = "sync_batch_norm"

    backend: str
    accumulate: int
    memory_efficient: bool = False
    on_nonfinite: OnNonFinite = "propagate"
    _activation: Activation | None = None
    _group_spec: GroupSpec
    _narrow: torch.dtype | None = None  # that the running statistics would have in a layer of torch, where it is half
    _path: str = ""  # the layer's name in the model, for errors that tell ranks apart
    _origin: type[nn.Module] | None
    _sync: bool
    _synced_over: int
    _torch_group: GroupSpec | None

    @property
    def process_group(self) -> str | int | GroupSpec:
        """Which ranks share statistics: ``"world"``, ``"node"``, ranks per group, or a remembered process group."""
        spec = self._group_spec
        if spec.kind == "size":
            return spec.size
        return spec if spec.kind in ("named", "outside") else spec.kind

    @process_group.setter
    def process_group(self, value: object) -> None:
        self._group_spec = group_spec(value)
        self._synced_over = 0

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        *,
        process_group: object = None,
        backend: str | None = None,
        accumulate: int | None = None,
        on_nonfinite: OnNonFinite | None = None,
        **own: Any,
    ) -> nn.Module:
        """Make ``module`` a layer of this class, in place; :meth:`release` undoes it.

        Args:
            module: A layer whose exact type has this class in :data:`TARGETS` (or, for the other families, is what the
                class reverts to); a layer of another family; or one of this class, which takes the settings that are given.
            process_group: As in the constructor; None keeps the group of a layer that has one, and is ``"world"`` else.
            backend: As in the constructor; None keeps, or is ``"auto"``.
            accumulate: As in the constructor; None keeps, or is 1.
            on_nonfinite: As in the constructor; None keeps, or is ``"propagate"``. Only SyncBatchNorm has it.
            **own: What this family alone has, as in its constructor.

        Returns:
            The same object.

        Raises:
            TypeError: If this class is not what the exact type of ``module`` is swapped to.
        """
        check_options(backend or "auto", 1 if accumulate is None else accumulate)
        check_policy(on_nonfinite or "propagate")
        spec = None if process_group is None else group_spec(process_group)
        if isinstance(module, Swapped):
            if type(module) is not cls and cls.family != module.family:
                if cls.reverts_to is not module.reverts_to:
                    raise TypeError(f"{cls.__name__} cannot take the place of {type(module).__name__}.")
                module._leave()
                for name in SYNC_BATCH_NORMS_OWN:
                    module.__dict__.pop(name, None)
                module._set_pending(1)
                module.__class__ = cls
                module._arrive(**own)
            elif own:
                module._change(**own)
            if spec is not None:
                module.process_group = spec
            if backend is not None:
                module.backend = backend
            if accumulate is not None and accumulate != module.accumulate:
                module._set_pending(accumulate)
            if on_nonfinite is not None:
                module.on_nonfinite = on_nonfinite
            return module
        sources = [t for t, target in TARGETS.items() if target is cls] or [cls.reverts_to]
        if type(module) not in sources:
            raise TypeError(
                f"{cls.__name__} takes the place of {[t.__name__ for t in sources]} and nothing else, got "
                f"{type(module).__name__}. register_adapter teaches it others."
            )
        origin: type[nn.Module] = type(module)
        torch_group: GroupSpec | None = None
        if "process_group" in module.__dict__:  # nn.SyncBatchNorm's, a live group that no copy could carry
            torch_group = group_spec(module.__dict__.pop("process_group"))
        module.__class__ = cls
        layer = cast(Swapped, module)
        layer._set_up(spec or torch_group or GroupSpec(), backend or "auto", accumulate or 1, origin, torch_group)
        layer._arrive(**own)
        if on_nonfinite is not None:
            layer.on_nonfinite = on_nonfinite
        return layer

    def release(self) -> nn.Module:
        """Give the layer its original class back, in place, and take away all that :meth:`adopt` added.

        Raises:
            SyncNormError: If the layer has an activation, which its original class has not.
        """
        if self._activation is not None:
            raise SyncNormError(
                f"{type(self).__name__}({self.num_features}) applies {self.activation!r}, and {self.reverts_to.__name__} "
                "would not. Set layer.activation = None and put the activation after it as a layer of its own."
            )
        self._leave()
        origin: type[nn.Module] = self._origin or self.reverts_to
        torch_group = self._torch_group
        self._drop_buffers("_pending")
        for name in ("running_mean", "running_var"):
            statistic, weight = self._buffers.get(name), self._parameters.get("weight")
            # Kept in float32 by us; torch's layer wants the statistics in the dtype of a half-precision weight.
            narrow = self._narrow if weight is None or weight.dtype not in HALVES else weight.dtype
            if statistic is not None and narrow is not None:
                self._buffers[name] = statistic.to(narrow)
        for name in OURS:
            self.__dict__.pop(name, None)
        self.__class__ = sharded_like(origin, type(self))  # type: ignore[assignment]
        if torch_group is not None:
            # A group that is gone, as after the end of a run, is not one to go back to.
            alive = torch_group.kind == "named" and group_ranks(torch_group.name) == torch_group.ranks
            self.__dict__["process_group"] = find_group(torch_group.name) if alive else None
        return self

    def settings(self) -> dict[str, Any]:
        """What :meth:`adopt` needs to make a layer like this one."""
        return {"process_group": self.process_group, "backend": self.backend, "accumulate": self.accumulate}

    def _change(self, *_: Any, **own: Any) -> None:
        """Take new settings of this family."""
        for name, value in own.items():
            setattr(self, name, value)

    def _arrive(self, *_: Any, **own: Any) -> None:
        """Add what this family has beside the base: at the end of the constructor, and when a layer is adopted."""

    def _leave(self) -> None:
        """Take it away."""

    def _set_up(
        self,
        spec: GroupSpec,
        backend: str,
        accumulate: int,
        origin: type[nn.Module] | None = None,
        torch_group: GroupSpec | None = None,
    ) -> None:
        self._group_spec, self.backend, self._sync, self._synced_over = spec, backend, True, 0
        self._origin, self._torch_group = origin, torch_group
        self._set_pending(accumulate)
        for name in ("running_mean", "running_var"):
            statistic = self._buffers.get(name)
            if statistic is not None and statistic.dtype in HALVES:  # too coarse for a running average; see _apply
                self._buffers[name], self._narrow = statistic.float(), statistic.dtype

    def _set_pending(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self._drop_buffers("_pending")
        if accumulate > 1:
            device = None if self.running_mean is None else self.running_mean.device
            pending = torch.zeros(2 * self.num_features + 2, dtype=torch.float64, device=device)
            self.register_buffer("_pending", pending, persistent=False)

    def _drop_buffers(self, *names: str) -> None:
        for name in names:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def _begin(self, name: str, buffer: Tensor) -> None:
        """Let a buffer that no state dict has hold what it holds at first."""
        buffer.zero_()

    def __setattr__(self, name: str, value: Any) -> None:
        was_meta = name in _WIDE and (before := self._buffers.get(name)) is not None and before.is_meta
        super().__setattr__(name, value)
        if was_meta and isinstance(value, Tensor) and not value.is_meta:
            self._begin(name, value)  # from_pretrained of transformers sets what the memory held

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.running_mean is None or self.running_mean.is_meta:
            return
        for name in _WIDE:
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.is_meta:  # of a layer born on meta that is given tensors, assign=True
                self._buffers[name] = torch.empty_like(buffer, device=self.running_mean.device)
                self._begin(name, self.get_buffer(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Half precision cannot hold a running average (momentum 0.1 moves it by less than its rounding), nor can it hold
        # the sums of micro-batches: where .half() or .bfloat16() narrows them, they move to the device as they are.
        names = ("running_mean", "running_var", *_WIDE)
        before = {name: self._buffers.get(name) for name in names}
        if self._narrow is not None:
            to = fn(torch.empty(0, dtype=self._narrow)).dtype  # what is float32 already cannot tell of a .float()
            self._narrow = to if to in HALVES else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is None or new is None:
                continue
            if name in _WIDE and old.is_meta and not new.is_meta:
                self._begin(name, new)  # to_empty leaves what the memory held
            if new.dtype == old.dtype:
                continue
            if name in _WIDE or (new.dtype in HALVES and old.dtype not in HALVES):
                self._narrow = self._narrow if name in _WIDE else new.dtype
                self._buffers[name] = old.to(new.device) if not new.is_meta else torch.empty_like(new, dtype=old.dtype)
        return self


def register_swap(source: type[nn.Module], target: type[Swapped]) -> None:
    """Let layers of exactly ``source`` be swapped to ``target``.

    Args:
        source: A batch norm class, usually a subclass with a ``forward`` of its own.
        target: A subclass of both ``source`` and :class:`syncnorm.modules.SyncStatistics` whose instances have the fields of
            ``source``.

    Raises:
        TypeError: If ``target`` is not such a subclass.
    """
    if not (issubclass(target, source) and issubclass(target, Swapped)):
        raise TypeError(
            f"the target must subclass both {source.__name__} and syncnorm.modules.SyncStatistics, so that an instance can "
            f"change between the two; {target.__name__} has bases {[base.__name__ for base in target.__mro__[1:-1]]}."
        )
    TARGETS[source] = target


def check_options(backend: str, accumulate: int) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}.")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate is a number of micro-batches, at least 1; got {accumulate!r}.")
