"""The base of the synchronised statistics family: what its layers compute, and over whom. Copies carry no process group."""

import os
import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn

from syncnorm.core.activation import Activation, find_activation
from syncnorm.distributed.groups import LOCAL, Group, GroupSpec, group_spec, resolve
from syncnorm.errors import SyncNormError, SyncNormNonFinite
from syncnorm.functional import sync_batch_norm
from syncnorm.functional._fused import check_invertible, check_residual, follow
from syncnorm.functional._masked_batch_norm import masked_batch_norm
from syncnorm.functional._nonfinite import OnNonFinite, check_policy
from syncnorm.functional._sync_batch_norm import evaluate, tell_others, validate
from syncnorm.modules._swap import TARGETS, Swapped, check_options

__all__ = ["GHOSTS", "SyncStatistics", "is_synced"]

_Model = TypeVar("_Model", bound=nn.Module)

GHOSTS: dict[type["SyncStatistics"], type["SyncStatistics"]] = {}
"""Which class a layer made with a ``virtual_batch_size`` has, by the class that was called."""


class SyncStatistics(Swapped):
    """Base of the layers that normalise over the ranks of a group. Subclasses come before a torch batch norm class.

    Attributes:
        backend: Kernel backend by name, or ``"auto"``.
        accumulate: Micro-batches per update of the running statistics.
        memory_efficient: Keep the output for the backward in place of the input.
        on_nonfinite: ``"propagate"``, ``"skip_update"`` or ``"raise"``; see the constructor of SyncBatchNorm.
    """

    input_dims: ClassVar[tuple[int, ...] | None] = None

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
        check_options(backend, accumulate)
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
        if isinstance(input, fx.Proxy) and input.tracer.root is not self:  # a leaf to torch.fx, as torch's layers are
            given = {"residual": residual, "mask": mask, "activation": activation}
            options = {name: value for name, value in given.items() if value is not None}
            traced: Any = input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), options)
            return traced
        activation = self._activation if activation is None else activation
        try:
            if mask is None and self.family == "sync_batch_norm":
                return self._synchronise(input, residual, activation)
            self._check_residual(input, residual)
            y = self._normalize(input) if mask is None else self._normalize_masked(input, mask)
            return follow(y, residual, activation)
        except (ValueError, TypeError, SyncNormError) as error:
            if torch.compiler.is_compiling():
                raise  # Dynamo of torch 2.11 shows the words of an error, but not those that another one takes from it
            raise self._named(error) from error

    def _named(self, error: Exception) -> Exception:
        text = f"{type(self).__name__}({self.num_features}): {error}"
        return SyncNormNonFinite(text, error.ranks) if isinstance(error, SyncNormNonFinite) else type(error)(text)

    def _check_residual(self, input: Tensor, residual: Tensor | None) -> None:
        # Before anything moves or meets.
        try:
            check_residual(input, residual)
        except ValueError:
            self._tell_others(input)
            raise

    def _tell_others(self, input: Tensor) -> None:
        """Send a refusal to the ranks that would wait for this one in a forward with ``input``."""
        if self.training:
            tell_others(input, self._group(), self.num_features, self)

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
    def convert_sync_batchnorm(cls, module: _Model, process_group: object = None) -> _Model:
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
        if self._activation is not None and self._activation.name == "leaky_relu":
            ours |= {"negative_slope": (self._activation.negative_slope, 0.01)}
        ours |= {"memory_efficient": (self.memory_efficient, False), "on_nonfinite": (self.on_nonfinite, "propagate")}
        extra = [f"{name}={value}" for name, (value, default) in ours.items() if value != default]
        return ", ".join([super().extra_repr(), *extra])  # type: ignore[no-untyped-call]

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
