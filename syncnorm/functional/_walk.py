"""What one call of a synchronised norm needs beside its tensors, and how its autograd functions are called."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.core.renorm import RenormLimits
from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import Call

__all__ = ["Walk", "apply_function", "empty_after", "moments_of_none"]


class Walk(NamedTuple):
    """What one call needs beside its tensors.

    Attributes:
        eps: Added to the variance.
        group: The ranks that meet.
        backend: Name of a kernel backend, or ``"auto"``.
        needs_backward: Whether a backward follows on this rank.
        site: Identity of the layer, by which a checkpointed recompute finds its forward.
        renorm: Limits of batch renormalisation; None for plain batch normalisation.
        activation: Applied to the sum of what was normalised and the residual.
        memory_efficient: Keep the output for the backward in place of the input.
        refuses_nonfinite: Whether moments that are not finite are an error.
        call: What the ranks that meet compare.
        known: Moments over all ranks, and the correction of batch renormalisation, where they need not be found.
    """

    eps: float
    group: Group
    backend: str
    needs_backward: bool
    site: object = None
    renorm: RenormLimits | None = None
    activation: Activation | None = None
    memory_efficient: bool = False
    refuses_nonfinite: bool = False
    call: Call | None = None
    known: tuple[Moments, tuple[Tensor, ...]] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing comes between the moments of all ranks and their use."""
        return self.renorm is None and not self.refuses_nonfinite


def apply_function(function: type[Function], *arguments: Any) -> Any:
    """``function.apply`` at half its price."""
    # Function.apply inspects the signature of forward at every call, 35 µs here; only torch.func's transforms need that.
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def empty_after(vector: Tensor, x: Tensor) -> Tensor:
    """An empty tensor like ``x`` that is formed from ``vector``, the result of an exchange."""
    # torch.compile drops an exchange that no result depends on, and puts one that does not depend on the gradient into
    # the forward graph; either way the other ranks would wait for this one.
    return x * vector.to(x.dtype).view(x.size(1), *[1] * (x.dim() - 2))


def moments_of_none(x: Tensor) -> Moments:
    """Moments of no samples, as a shard ``x`` [N, C, *] without values brings them to an exchange, formed from ``x``."""
    # Where a graph has two exchanges of the same constants, torch.compile makes them one, and the other ranks would wait
    # for the second.
    zeros = x[:0].sum([d for d in range(x.dim()) if d != 1], dtype=torch.float64)
    return Moments(0.0, zeros, torch.zeros_like(zeros))
