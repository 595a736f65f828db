"""What one call of a synchronised norm needs beside its tensors, and how its autograd functions are called."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.core.renorm import RenormLimits
from syncnorm.distributed.agreement import num_begun
from syncnorm.distributed.exchange import send_poison
from syncnorm.distributed.groups import Group
from syncnorm.distributed.ledger import Call

__all__ = ["Walk", "apply_function", "empty_after", "moments_of_none", "tells", "was_told"]

_TOLD = "_told_to_ranks"
_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def tells(direction: str, find: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Decorate a direction of an autograd function: what fails in it before ranks meet is told to those who wait there.

    Args:
        direction: As in :func:`syncnorm.distributed.agreement.meet`.
        find: Of its arguments what has the ``group`` that meets, and the ``call``.
    """

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def telling(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*arguments)
            before = num_begun()
            try:
                return function(*arguments)
            except Exception as error:
                walk, x = find(*arguments), next((a for a in arguments if isinstance(a, Tensor)), None)
                if num_begun() == before and walk.group.size > 1 and x is not None:
                    error.__dict__[_TOLD] = True
                    with suppress(RuntimeError):  # what failed first says more
                        num_features = x.size(1) if direction == "forward" else 0
                        send_poison(num_features, x.device, walk.group, walk.call, direction)
                raise

        return telling  # type: ignore[return-value]

    return decorate


def was_told(error: BaseException) -> bool:
    """Whether the other ranks know of it, by :func:`tells`."""
    return _TOLD in error.__dict__


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
