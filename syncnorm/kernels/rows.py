"""The second seam: norms of rows and of groups of channels, which see one sample at a time.

Each backend is a module with the functions of :class:`RowBackend`. The forward functions of ``aten`` and ``reference`` are
made of torch's differentiable operators; the others need the backward functions beside them.
"""

# M rows, D features; N batch, C channels, S flattened space, G groups

from types import ModuleType
from typing import Protocol, cast

from torch import Tensor

from syncnorm.core.activation import Activation
from syncnorm.kernels import aten_rows, reference_rows
from syncnorm.kernels._choice import check_name, pick
from syncnorm.kernels.native import rows as native_rows
from syncnorm.kernels.triton import rows as triton_rows

__all__ = ["ROW_BACKENDS", "RowBackend", "check_row_backend", "choose_rows", "row_objections", "takes_features_apart"]


class RowBackend(Protocol):
    """Four primitives. Statistics, and gradients of vectors, are float32, or float64 for float64 inputs."""

    def objection(self, x: Tensor) -> str | None:
        """Why this backend would not serve ``x``, of any shape, in a sentence; None if it would."""

    def row_norm_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centre: bool,
        residual: Tensor | None = None,
        part: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Normalise each row of ``h = x + residual`` as it is in the dtype of ``x``.

        Args:
            x: ``[M, D]``, contiguous; where :func:`takes_features_apart`, and without ``part``, also ``[N, S, D]`` with
                strides (S·D, 1, S), whose N·S rows count as M.
            weight: ``[D]``, of any floating dtype, or None.
            bias: ``[D]``, of any floating dtype, or None.
            eps: Added to the variance, or to the mean square.
            centre: True for layer norm, False for RMS norm.
            residual: Like ``x``, or None.
            part: How many of the first features the mean square is taken over; None for all. Without centring only.

        Returns:
            ``y`` and ``h`` like ``x``; mean and rstd ``[M]``. ``h`` is None without a residual, mean without centring.
        """

    def row_norm_backward(
        self,
        grad: Tensor,
        h: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        needs_weight: bool,
        needs_bias: bool,
        grad_h: Tensor | None = None,
        part: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of ``x`` (and of the residual), weight and bias; the latter None where they are not needed.

        Args:
            grad: Of ``y``, like ``h``.
            h: What was normalised, laid out like ``x``.
            weight: As in the forward.
            mean: From the forward.
            rstd: From the forward.
            needs_weight: Whether the weight's gradient is wanted.
            needs_bias: Whether the bias's gradient is wanted.
            grad_h: Of ``h`` itself, like ``h``; added to the first result.
            part: As in the forward.
        """

    def group_norm_forward(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: Activation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise each sample over groups of adjacent channels and over space, and apply the activation.

        Args:
            x: ``[N, C, S]``, contiguous or with strides (S·C, 1, C).
            num_groups: G, a divisor of C.
            weight: ``[C]``, of any floating dtype, or None.
            bias: ``[C]``, of any floating dtype, or None.
            eps: Added to the variance.
            activation: Applied last.

        Returns:
            ``y`` like ``x``; mean and rstd ``[N, G]``.
        """

    def group_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        activation: Activation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``x`` (like it), weight and bias ``[C]``; ``grad`` has the strides of ``x``.

        What the activation was applied to is computed again from ``x``.
        """


def _backend(module: ModuleType) -> RowBackend:
    return cast(RowBackend, module)


# In the order in which "auto" asks.
ROW_BACKENDS: dict[str, RowBackend] = {
    "native": _backend(native_rows),
    "triton": _backend(triton_rows),
    "aten": _backend(aten_rows),
    "reference": _backend(reference_rows),
}


def choose_rows(name: str, x: Tensor) -> RowBackend:
    """The backend for ``x``: by name, or the first without an objection for ``"auto"``.

    Raises:
        ValueError: For an unknown name.
        SyncNormError: If a backend asked for by name objects.
    """
    return pick(ROW_BACKENDS, name, x)


def row_objections(x: Tensor) -> dict[str, str | None]:
    """What each backend says to ``x``, in the order in which ``auto`` asks."""
    return {name: backend.objection(x) for name, backend in ROW_BACKENDS.items()}


def takes_features_apart(backend: RowBackend, x: Tensor) -> bool:
    """Whether the row primitives take ``x`` [N, *, D] where it lies as [N, D, *]; others get a copy that is contiguous."""
    rule = getattr(backend, "takes_features_apart", None)
    return rule is not None and rule(x)


def check_row_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or that of a backend."""
    check_name(ROW_BACKENDS, name)
