"""Spectral norm: a weight divided by the largest singular value of the map that it stands for, by power iteration.

For a convolution there are two such maps: its weight reshaped to a matrix, as in the paper, and the convolution itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional, grad

from syncnorm.core.autocast import without_autocast
from syncnorm.functional._inputs import accumulate_dtype, check_floating

__all__ = ["ConvolutionMap", "LinearMap", "MatrixMap", "spectral_norm"]

_CONVOLUTIONS = {
    3: (functional.conv1d, grad.conv1d_input),
    4: (functional.conv2d, grad.conv2d_input),
    5: (functional.conv3d, grad.conv3d_input),
}


class LinearMap(Protocol):
    """What a weight does to a vector, and the adjoint of that."""

    def input_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Shape of the vectors that it takes."""

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """The map."""

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """Its adjoint: ``⟨u, apply(v)⟩ = ⟨adjoint(u), v⟩``."""


@dataclass(frozen=True)
class MatrixMap:
    """The weight as a matrix of ``weight.size(dim)`` rows; a vector as one column."""

    dim: int = 0

    def input_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (self._matrix(weight).size(1),)

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        return self._matrix(weight) @ v

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        return self._matrix(weight).T @ u

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0).flatten(1) if weight.dim() > 1 else weight.reshape(-1, 1)


@dataclass(frozen=True)
class ConvolutionMap:
    """The convolution of maps of one size, zero-padded.

    Attributes:
        in_channels: Channels of its input.
        size: Spatial size of its input. Smaller inputs have no larger norm.
        stride: Per spatial dim.
        padding: As ``torch.nn.functional.pad`` takes it: last dim first, before and after.
        dilation: Per spatial dim.
        groups: Of channels.
    """

    in_channels: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def input_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (1, self.in_channels, *self.size)

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        convolve = _CONVOLUTIONS[weight.dim()][0]
        padded = functional.pad(v, self.padding)
        return convolve(padded, weight, None, self.stride, 0, self.dilation, self.groups)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        gradient: Callable[..., Tensor] = _CONVOLUTIONS[weight.dim()][1]
        last_first = [n + self.padding[2 * i] + self.padding[2 * i + 1] for i, n in enumerate(reversed(self.size))]
        shape = (1, self.in_channels, *reversed(last_first))
        padded = gradient(shape, weight, u, self.stride, 0, self.dilation, self.groups)
        return functional.pad(padded, [-n for n in self.padding])


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    num_iterations: int = 1,
    linear_map: LinearMap | None = None,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a weight by an estimate of its largest singular value, ``σ = ⟨u, W v⟩``.

    u and v are constants to the gradient; where they are singular vectors, that gradient is exact. The estimate comes
    from below, so that the result has a norm of slightly more than 1 until the iterations have settled.

    Args:
        weight: Any floating dtype.
        u: Estimate of the left singular vector, of norm 1.
        v: Estimate of the right singular vector, of norm 1.
        num_iterations: Power iterations before use; 0 to use ``u`` and ``v`` as they are.
        linear_map: What the weight stands for; by default a matrix with dim 0 as rows.
        eps: Smallest norm that anything is divided by.

    Returns:
        The normalised weight, in its dtype, and the new u and v. Computed in at least float32.

    Raises:
        TypeError: If the weight is not floating point.

    Reference: Miyato, Kataoka, Koyama & Yoshida (2018), algorithm 1; for convolutions as maps, Gouk, Frank, Pfahringer &
    Cree (2021), section 4.
    """
    check_floating("spectral_norm", weight)
    linear_map = MatrixMap() if linear_map is None else linear_map
    wide = weight.to(accumulate_dtype(weight.dtype))
    u, v = u.to(wide.dtype), v.to(wide.dtype)
    with without_autocast(wide):
        with torch.no_grad():
            for _ in range(num_iterations):
                u = _unit(linear_map.apply(wide, v), eps)
                v = _unit(linear_map.adjoint(wide, u), eps)
        sigma = (u * linear_map.apply(wide, v)).sum()
    safe = torch.where(sigma.abs() < eps, torch.full_like(sigma, eps), sigma)
    return (wide / safe).to(weight.dtype), u, v


def _unit(x: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x)
    return x / length.clamp(min=eps)
