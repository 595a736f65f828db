"""RMS norm: layer norm without the centring; and its partial form, whose RMS comes from the first features only."""

# D normalised features, K of them in the RMS

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from syncnorm.functional._inputs import accumulate_dtype
from syncnorm.functional._layer_norm import check_normalized, normalize_rows

__all__ = ["check_part", "rms_norm"]


@overload
def rms_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 1.0,
    channel_dim: int = -1,
    residual: None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def rms_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 1.0,
    channel_dim: int = -1,
    residual: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    input: Tensor,
    dim: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 1.0,
    channel_dim: int = -1,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide the features of each sample or position by their root mean square: ``y = x / sqrt(⟨x²⟩ + eps) · γ``.

    The authors' code adds eps outside the root, torch and this function inside; apart from inputs near 0 they agree.

    Args:
        input: ``[*, D]``, or D at ``channel_dim``; any floating dtype, any layout; other dims may be 0.
        dim: D, or the sizes of the last dims, which are then normalised together.
        weight: γ, of shape ``dim``, or None.
        eps: Added to the mean square. None for the precision of the statistics: that of float64 for float64 inputs,
            else of float32.
        p: Share of the features that the mean square is taken over: the first ``int(D · p)``, at least one (pRMSNorm).
        channel_dim: Where D is, if not last. Only with a single D.
        residual: Added to ``input`` first, in its dtype: of its shape, dtype and device.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Returns:
        Tensor like ``input``, in its dtype and layout; with a residual a pair, the norm of the sum and the sum, which
        goes on past the layer. Statistics are at least float32.

    Raises:
        ValueError: If the input has other sizes than ``dim`` there, the residual is not like the input, or ``p`` is not
            in (0, 1].
        TypeError: If the input is not floating point.

    Reference: Zhang & Sennrich (2019), equation 4; section 5 for the partial form.
    """
    check_part("rms_norm", p)
    shape = check_normalized("rms_norm", input, dim, channel_dim, residual)
    eps = torch.finfo(accumulate_dtype(input.dtype)).eps if eps is None else eps
    part = max(1, int(math.prod(shape) * p)) if p < 1 else None
    return normalize_rows(
        input, shape, channel_dim, weight, None, eps, centre=False, residual=residual, backend=backend, part=part
    )


def check_part(name: str, p: float) -> None:
    """Raise ValueError unless ``p`` is a share of the features."""
    if not 0 < p <= 1:
        raise ValueError(f"{name}: p is the share of the features that the RMS is taken over, in (0, 1]; got {p}.")
