"""The same mathematics, fast, behind one seam: four primitives of batch normalisation, and who may serve them.

A backend is a module with the functions of :class:`Backend`. The reference defines what is right and runs anywhere. Each
backend says in a sentence why it would not serve an input; ``auto`` takes the first without an objection, and a backend
asked for by name runs or raises with its objection.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, cast

from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.core.moments import Moments
from syncnorm.kernels import aten, native, reference, triton
from syncnorm.kernels._choice import pick

__all__ = ["BACKENDS", "Alone", "Among", "Backend", "alone", "among", "choose", "objections"]


class Backend(Protocol):
    """Four primitives on flat tensors, [N, C, S] or [M, C] (see :mod:`syncnorm.core.layout`). Statistics are float64 [C]."""

    def objection(self, x: Tensor) -> str | None:
        """Why this backend would not serve ``x`` [N, C, *], in a sentence; None if it would."""

    def batch_moments(self, x: Tensor) -> Moments:
        """Count, mean and M2 per channel; torch's ``batch_norm_stats``."""

    def batch_normalize(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``act((x - mean)·rstd·weight + bias + residual)`` in the dtype of ``x``; torch's ``batch_norm_elemt``, and more.

        Second comes a mask where both a residual and a piecewise linear activation are given, else None: whether what the
        activation was applied to is positive, one bit an element, uint8 in an order of the backend's own.
        """

    def batch_backward_reduce(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        side: Tensor | None = None,
    ) -> Tensor:
        """Σg' and Σg'·x̂, float64 ``[2, C]``, with g' = g·act'(pre); torch's ``batch_norm_backward_reduce``, and more.

        What the activation was applied to is computed again from ``x``; with a residual, ``side`` is the mask, or for the
        smooth activations the residual itself.
        """

    def batch_backward_input(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        means: Tensor,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        side: Tensor | None = None,
        needs_residual: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``rstd·weight·(g' - ⟨g'⟩ - x̂⟨g'·x̂⟩)`` with ``means`` = [⟨g'⟩, ⟨g'·x̂⟩]; torch's ``batch_norm_backward_elemt``.

        Second comes g', the gradient of the residual, where it is asked for and is not ``grad`` itself; else None.
        """


class Alone(Protocol):
    """What a backend may have beside the primitives: a whole direction in one call, for a group of one.

    Nothing stands between the passes over the data there, so they need not be passes over memory.
    """

    def serves_whole(self, x: Tensor) -> bool:
        """Whether these calls take ``x``, which the primitives serve."""

    def batch_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: Activation | None,
        residual: Tensor | None,
        chunks: Sequence[int] = (),
    ) -> tuple[Tensor, Moments, Tensor, Tensor | None]:
        """y, moments, ``1/√(var + eps)`` and mask, by ``batch_moments`` and ``batch_normalize``.

        ``chunks`` are numbers of samples (of dim 0 of flat ``x``) that are normalised by themselves: statistics are then
        ``[K, C]``, and there is no mask.
        """

    def batch_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: Activation | None,
        side: Tensor | None,
        needs_residual: bool,
        chunks: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of x, residual, bias and weight, by ``batch_backward_reduce`` and ``batch_backward_input``.

        With the ``chunks`` of the forward; bias and weight get the sum over them.
        """


class Among(Protocol):
    """What a backend may have for a rank among others: each direction in two calls, up to the row and after it.

    A row is float64 ``[width]``: the sums that ranks add up, zeros, and the words at its end. Words come back where the host
    reads them for nothing, and the count of the moments as a float or as a tensor, likewise.
    """

    def batch_forward_row(self, x: Tensor, width: int, words: Sequence[float]) -> Tensor:
        """The moments of flat ``x``, packed."""

    def batch_forward_rest(
        self,
        row: Tensor,
        num_words: int,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: Activation | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Moments, Tensor, Tensor | None, list[float] | None]:
        """y, moments of all ranks, ``1/√(var + eps)``, mask and words, from the row of all ranks."""

    def batch_backward_row(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: Activation | None,
        side: Tensor | None,
        width: int,
        words: Sequence[float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σg' and Σg'·x̂, packed; and as this rank's gradients of bias and weight."""

    def batch_backward_rest(
        self,
        row: Tensor,
        num_words: int,
        count: Any,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: Activation | None,
        side: Tensor | None,
        needs_residual: bool,
    ) -> tuple[Tensor, Tensor | None, list[float] | None]:
        """Gradients of x and of the residual (None where it is ``grad``), and words, from the row of all ranks."""


def alone(backend: Backend, x: Tensor) -> Alone | None:
    """The backend, if it has a call for each whole direction that takes ``x``."""
    if not hasattr(backend, "batch_forward"):
        return None
    whole = cast(Alone, backend)
    return whole if whole.serves_whole(x) else None


def among(backend: Backend) -> Among | None:
    """The backend's calls for a rank among others, if it has them. Of memory, and not of what stands for it in a trace."""
    return next((_calls(name) for name in ("native", "triton") if backend is BACKENDS[name]), None)


@cache
def _calls(name: str) -> Among:
    return cast(Among, import_module(f"syncnorm.kernels.{name}.among"))  # triton's brings triton


def _backend(module: ModuleType) -> Backend:
    return cast(Backend, module)


# In the order in which "auto" asks.
BACKENDS: dict[str, Backend] = {
    "native": _backend(native),
    "aten": _backend(aten),
    "triton": _backend(triton),
    "reference": _backend(reference),
}


def choose(name: str, x: Tensor) -> Backend:
    """The backend for ``x``: by name, or the first without an objection for ``"auto"``.

    Raises:
        ValueError: For an unknown name.
        SyncNormError: If a backend asked for by name objects.
    """
    return pick(BACKENDS, name, x)


def objections(x: Tensor) -> dict[str, str | None]:
    """What each backend says to ``x`` [N, C, *], in the order in which ``auto`` asks."""
    return {name: backend.objection(x) for name, backend in BACKENDS.items()}
