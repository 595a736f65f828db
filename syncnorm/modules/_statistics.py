"""What the synchronised statistics family shares: its few fields, the class swap, copies that carry no process group.

A converted layer is the same object with another class. Parameters, buffers, hooks, names, optimizer and EMA references
and every alias stay; going back is another swap.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from syncnorm.core.activation import Activation, find_activation
from syncnorm.distributed.collectives import find_group, group_ranks
from syncnorm.distributed.groups import LOCAL, Group, GroupSpec, group_spec, resolve
from syncnorm.errors import SyncNormError, SyncNormNonFinite
from syncnorm.functional import sync_batch_norm
from syncnorm.functional._fused import check_invertible, check_residual, follow
from syncnorm.functional._masked_batch_norm import masked_batch_norm
from syncnorm.functional._nonfinite import OnNonFinite, check_policy
from syncnorm.functional._sync_batch_norm import evaluate, validate
from syncnorm.kernels import BACKENDS
from syncnorm.modules._sharded import sharded_like

__all__ = ["GHOSTS", "TARGETS", "SyncStatistics", "is_synced", "register_swap"]

TARGETS: dict[type[nn.Module], type["SyncStatistics"]] = {}
"""Which class each exact type is swapped to."""

GHOSTS: dict[type["SyncStatistics"], type["SyncStatistics"]] = {}
"""Which class a layer made with a ``virtual_batch_size`` has, by the class that was called."""

_WIDE = ("_pending", "_limits", "_clip_rate", "_squares", "_slopes")
"""Buffers that stay float64 whatever the model is cast to."""

_OURS = (
    "_activation", "_group_spec", "_origin", "_path", "_sync", "_synced_over", "_torch_group", "accumulate", "backend",
    "memory_efficient", "on_nonfinite",
)  # fmt: skip
_HALVES = (torch.float16, torch.bfloat16)


class SyncStatistics(_BatchNorm):
    """Base of the layers that normalise over the ranks of a group. Subclasses come before a torch batch norm class.

    Attributes:
        backend: Kernel backend by name, or ``"auto"``.
        accumulate: Micro-batches per update of the running statistics.
        memory_efficient: Keep the output for the backward in place of the input.
        on_nonfinite: ``"propagate"``, ``"skip_update"`` or ``"raise"``; see the constructor of SyncBatchNorm.
    """

    reverts_to: ClassVar[type[nn.Module]]
    family: ClassVar[str] = "sync_batch_norm"
    input_dims: ClassVar[tuple[int, ...] | None] = None

    backend: str
    accumulate: int
    memory_efficient: bool = False
    on_nonfinite: OnNonFinite = "propagate"
    _activation: Activation | None = None
    _group_spec: GroupSpec
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

    @property
    def activation(self) -> str | None:
        """What the layer applies to its result: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"`` or None."""
        return None if self._activation is None else self._activation.name

    @activation.setter
    def activation(self, value: str | Activation | None) -> None:
        self._activation = find_activation(value)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: object = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backend: str = "auto",
        accumulate: int = 1,
        virtual_batch_size: int | None = None,
        activation: str | Activation | None = None,
        negative_slope: float = 0.01,
        memory_efficient: bool = False,
        on_nonfinite: OnNonFinite = "propagate",
    ) -> None:
        if eps < 0:
            raise ValueError(f"eps must be positive, got {eps}.")
        _check_options(backend, accumulate)
        act = find_activation(activation, negative_slope)
        if memory_efficient:
            check_invertible(None, None, None, act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self._set_up(group_spec(process_group), backend, accumulate)
        self._activation, self.memory_efficient = act, memory_efficient
        check_policy(on_nonfinite)
        self.on_nonfinite = on_nonfinite
        if virtual_batch_size is not None:
            self._become_ghosts(virtual_batch_size)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        activation: Activation | None = None,
    ) -> Tensor:
        """Compute ``act(norm(input) + residual)``: by the statistics of all ranks when training, else by the running ones.

        Args:
            input: ``[N, C, *]``.
            residual: Added before the activation; of the shape and dtype of ``input``, in any layout.
            mask: Which values count in the statistics, or how much: ``[N]``, ``[N, *]`` or ``[N, 1, *]``; see
                :func:`syncnorm.functional.masked_batch_norm`. All ranks must give one, or none.
            activation: For this call, in place of the layer's own.
        """
        activation = self._activation if activation is None else activation
        try:
            if mask is None and self.family == "sync_batch_norm":
                return self._synchronise(input, residual, activation)
            y = self._normalize(input) if mask is None else self._normalize_masked(input, mask)
            return follow(y, residual, activation)
        except (ValueError, TypeError, SyncNormError) as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> Exception:
        text = f"{type(self).__name__}({self.num_features}): {error}"
        return SyncNormNonFinite(text, error.ranks) if isinstance(error, SyncNormNonFinite) else type(error)(text)

    def _normalize(self, input: Tensor) -> Tensor:
        """What a family other than SyncBatchNorm computes, without what follows."""
        raise NotImplementedError

    def _synchronise(self, input: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        if not self.training:
            validate(input, self.num_features, self.input_dims)
            check_residual(input, residual)
            return evaluate(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.eps, residual, activation
            )
        tracked = self.track_running_stats
        return sync_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked if tracked else None,
            group=self._group(),
            backend=self.backend,
            pending=self._buffers.get("_pending") if tracked else None,
            accumulate=self.accumulate,
            num_features=self.num_features,
            input_dims=self.input_dims,
            site=None if torch.compiler.is_compiling() else self,
            residual=residual,
            activation=activation,
            memory_efficient=self.memory_efficient,
            on_nonfinite=self.on_nonfinite,
        )

    def _normalize_masked(self, input: Tensor, mask: Tensor) -> Tensor:
        if self.family != "sync_batch_norm":
            raise TypeError("this kind of norm takes no mask; SyncBatchNorm does.")
        tracked = not self.training or self.track_running_stats
        return masked_batch_norm(
            input,
            mask,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked if tracked else None,
            group=self._group() if self.training else LOCAL,
            pending=self._buffers.get("_pending") if tracked else None,
            accumulate=self.accumulate,
            num_features=self.num_features,
            input_dims=self.input_dims,
            site=None if torch.compiler.is_compiling() else self,
            on_nonfinite=self.on_nonfinite,
        )

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
        _check_options(backend or "auto", 1 if accumulate is None else accumulate)
        check_policy(on_nonfinite or "propagate")
        spec = None if process_group is None else group_spec(process_group)
        if isinstance(module, SyncStatistics):
            if type(module) is not cls and cls.family != module.family:
                if cls.reverts_to is not module.reverts_to:
                    raise TypeError(f"{cls.__name__} cannot take the place of {type(module).__name__}.")
                module._leave()
                for name in ("memory_efficient", "on_nonfinite"):  # which SyncBatchNorm alone has
                    module.__dict__.pop(name, None)
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
        layer = cast(SyncStatistics, module)
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
        for name in _OURS:
            self.__dict__.pop(name, None)
        self._drop_buffers("_pending")
        for name in ("running_mean", "running_var"):
            statistic, weight = self._buffers.get(name), self._parameters.get("weight")
            if statistic is not None and weight is not None and weight.dtype in _HALVES:
                # Kept in float32 by us; torch's layer wants the statistics in the dtype of a half-precision weight.
                self._buffers[name] = statistic.to(weight.dtype)
        self.__class__ = sharded_like(origin, type(self))  # type: ignore[assignment]
        if torch_group is not None:
            # A group that is gone, as after the end of a run, is not one to go back to.
            alive = torch_group.kind == "named" and group_ranks(torch_group.name) == torch_group.ranks
            self.__dict__["process_group"] = find_group(torch_group.name) if alive else None
        return self

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: object = None) -> nn.Module:
        """As ``nn.SyncBatchNorm.convert_sync_batchnorm``, in place: every batch norm in ``module`` becomes synchronised.

        :func:`syncnorm.convert` does the same with a choice of layers, a report and a warning for what it leaves.
        """
        for layer in list(module.modules()):
            if is_synced(layer) or type(layer) in TARGETS:
                target = TARGETS.get(type(layer), SyncStatistics)
                target.adopt(layer, process_group=process_group)
        return module

    def reset_running_stats(self) -> None:
        """As torch's; the sums of micro-batches start again, too."""
        super().reset_running_stats()
        pending = self._buffers.get("_pending")
        if pending is not None:
            pending.zero_()

    def extra_repr(self) -> str:
        """The fields of torch's layer, and ours where they are not the default."""
        ours = {"process_group": (self._group_spec, GroupSpec()), "backend": (self.backend, "auto")}
        ours |= {"accumulate": (self.accumulate, 1), "activation": (self.activation, None)}
        ours |= {"memory_efficient": (self.memory_efficient, False), "on_nonfinite": (self.on_nonfinite, "propagate")}
        extra = [f"{name}={value}" for name, (value, default) in ours.items() if value != default]
        return ", ".join([super().extra_repr(), *extra])  # type: ignore[no-untyped-call]

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

    def _become_ghosts(self, virtual_batch_size: int) -> None:
        ghosts = GHOSTS.get(type(self))
        if ghosts is None:
            raise TypeError(
                f"virtual_batch_size makes one of {[made.__name__ for made in GHOSTS]} a ghost batch norm, not a "
                f"{type(self).__name__}. Subclass {[made.__name__ for made in GHOSTS.values()]} instead."
            )
        if self.accumulate > 1:
            raise ValueError(
                f"virtual_batch_size={virtual_batch_size} and accumulate={self.accumulate} exclude each other: the running "
                "statistics of ghosts are averages over ghosts, not those of a pooled batch. Choose one."
            )
        if self.memory_efficient:
            raise ValueError(
                f"virtual_batch_size={virtual_batch_size} and memory_efficient=True exclude each other: ghosts keep their "
                "input for the backward. Choose one."
            )
        self.__class__ = ghosts
        self._arrive(virtual_batch_size)

    def _group(self) -> Group:
        if not self._sync:
            return LOCAL
        group: Group = resolve(self._group_spec)
        if torch.compiler.is_compiling():
            return group
        if not group.name and self._synced_over > 1:
            raise SyncNormError(
                f"the layer was synchronised over {self._synced_over} ranks and now there is no process group. Initialise it "
                "again, or say that one process is meant: syncnorm.revert(model), or `with syncnorm.disabled(model):`."
            )
        if self._synced_over != group.size:
            self._synced_over = group.size
            if not group.name:
                _warn_of_launcher(self)
        return group

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
            if statistic is not None and statistic.dtype in _HALVES:  # too coarse for a running average; see _apply
                self._buffers[name] = statistic.float()

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Half precision cannot hold a running average (momentum 0.1 moves it by less than its rounding), nor can it hold
        # the sums of micro-batches: where .half() or .bfloat16() narrows them, they move to the device as they are.
        names = ("running_mean", "running_var", *_WIDE)
        before = {name: self._buffers.get(name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is None or new is None or new.dtype == old.dtype:
                continue
            if name in _WIDE or (new.dtype in _HALVES and old.dtype not in _HALVES):
                self._buffers[name] = old.to(new.device) if not new.is_meta else torch.empty_like(new, dtype=old.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy may wake up in a process of its own: that it ran over ranks is not part of it.
        return {**self.__dict__, "_synced_over": 0}


_warned = False


def _warn_of_launcher(layer: SyncStatistics) -> None:
    """Once per process: the first layer that runs alone where a launcher has started several ranks."""
    global _warned
    ranks = os.environ.get("WORLD_SIZE", "1")
    if not _warned and ranks.isdecimal() and int(ranks) > 1:
        _warned = True
        warnings.warn(
            f"{layer._path or type(layer).__name__} is plain batch norm, of this process alone: WORLD_SIZE={ranks} says that "
            "there are more ranks, but no process group. Call torch.distributed.init_process_group before training, or say "
            "that one process is meant: syncnorm.revert(model), or `with syncnorm.disabled(model):`.",
            stacklevel=2,
        )


def is_synced(module: nn.Module) -> bool:
    """Whether ``module`` is one of our synchronised layers."""
    return isinstance(module, SyncStatistics)


def register_swap(source: type[nn.Module], target: type[SyncStatistics]) -> None:
    """Let layers of exactly ``source`` be swapped to ``target``.

    Args:
        source: A batch norm class, usually a subclass with a ``forward`` of its own.
        target: A subclass of both ``source`` and :class:`SyncStatistics` whose instances have the fields of ``source``.

    Raises:
        TypeError: If ``target`` is not such a subclass.
    """
    if not (issubclass(target, source) and issubclass(target, SyncStatistics)):
        raise TypeError(
            f"the target must subclass both {source.__name__} and syncnorm.modules.SyncStatistics, so that an instance can "
            f"change between the two; {target.__name__} has bases {[base.__name__ for base in target.__mro__[1:-1]]}."
        )
    TARGETS[source] = target


def _check_options(backend: str, accumulate: int) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}.")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate is a number of micro-batches, at least 1; got {accumulate!r}.")
