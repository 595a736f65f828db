"""Spectral norm as a parametrization of a layer's weight, for the matrix or for the convolution itself."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from syncnorm.functional._checkpoint import (
    is_recomputing,
    recall_call,
    remember_call,
    unseen_by_selective_checkpointing,
)
from syncnorm.functional._spectral_norm import ConvolutionMap, LinearMap, MatrixMap
from syncnorm.functional._spectral_norm import spectral_norm as normalize

__all__ = ["spectral_norm"]

_Layer = TypeVar("_Layer", bound=nn.Module)


def spectral_norm(
    module: _Layer,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    norm: Literal["matrix", "operator"] = "matrix",
    input_shape: Sequence[int] | None = None,
) -> _Layer:
    """Divide a layer's weight by its largest singular value from now on, as a parametrization.

    The singular vectors are buffers that move by ``n_power_iterations`` at every use of the weight in training (so two
    forwards of one input differ a little; a checkpointed region that is run again does, too), and stay in evaluation.
    Wrap several uses in ``torch.nn.utils.parametrize.cached()`` to share one.

    For a convolution, ``norm="matrix"``, the paper's choice, is the norm of the weight reshaped to ``[out, in · kernel]``.
    It does not bound what the convolution does: that may be larger by up to the root of the number of kernel elements.
    ``norm="operator"`` is the norm of the convolution on zero-padded maps of ``input_shape``: a Lipschitz constant of 1 for
    maps up to that size, once the iterations have settled. Each iteration then costs two convolutions of one map.

    Args:
        module: Changed in place. With ``norm="operator"`` an ``nn.Conv1d/2d/3d`` with zero padding.
        name: Of its weight.
        n_power_iterations: Per use in training.
        eps: Smallest norm that anything is divided by.
        dim: The weight's dim of outputs; by default 1 for transposed convolutions, else 0. Only with ``norm="matrix"``.
        norm: Of the reshaped matrix, or of the convolution as an operator.
        input_shape: Spatial size of the maps, such as ``(32, 32)``. Only, and always, with ``norm="operator"``.

    Returns:
        The same module. The state dict is that of ``torch.nn.utils.parametrizations.spectral_norm`` for the matrix norm.

    Raises:
        ValueError: If the module has no such tensor, or an argument is out of range or does not go with ``norm``.
        TypeError: For the operator norm of something else than a convolution.

    Example:
        >>> conv = spectral_norm(nn.Conv2d(3, 8, 3, padding=1), norm="operator", input_shape=(32, 32))
        >>> conv(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 8, 32, 32])

    Reference: Miyato, Kataoka, Koyama & Yoshida (2018), algorithm 1; for convolutions as maps, Gouk, Frank, Pfahringer &
    Cree (2021), section 4.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: {type(module).__name__} has no tensor {name!r} to normalise.")
    if n_power_iterations < 1:
        raise ValueError(f"spectral_norm: n_power_iterations must be at least 1, got {n_power_iterations}.")
    linear_map: LinearMap
    if norm == "operator":
        linear_map = _convolution_map(module, name, dim, input_shape)
    elif norm == "matrix":
        if input_shape is not None:
            raise ValueError('spectral_norm: input_shape goes with norm="operator", got norm="matrix".')
        linear_map = MatrixMap(_output_dim(module, weight, dim))
    else:
        raise ValueError(f'spectral_norm: norm must be "matrix" or "operator", got {norm!r}.')
    parametrize.register_parametrization(
        module, name, _SpectralNorm(weight.detach(), linear_map, n_power_iterations, eps)
    )
    return module


class _SpectralNorm(nn.Module):
    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, linear_map: LinearMap, n_power_iterations: int, eps: float) -> None:
        super().__init__()
        self.linear_map, self.n_power_iterations, self.eps = linear_map, n_power_iterations, eps
        wide = torch.promote_types(weight.dtype, torch.float32)
        v = torch.randn(linear_map.input_shape(weight), device=weight.device, dtype=wide)
        u = linear_map.apply(weight.to(wide), v)
        _, u, v = normalize(weight, u, v, 15, linear_map, eps)  # as torch: a start worth using
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)

    def forward(self, weight: Tensor) -> Tensor:
        u, v = self._vectors(weight)
        return normalize(weight, u, v, 0, self.linear_map, self.eps)[0]

    @torch.no_grad()
    def _vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U and v for one use of the weight; a training forward moves them first, its recompute in a checkpoint does not."""
        recomputing = is_recomputing()
        found = recall_call(self, None) if recomputing else None
        if found is not None:
            u, v = found
            return u, v
        # Copies: a second use moves the buffers before the first has gone backward (D(real) - D(fake)).
        if recomputing or not self.training:
            return self._u.clone(), self._v.clone()
        with unseen_by_selective_checkpointing():
            _, u, v = normalize(weight, self._u, self._v, self.n_power_iterations, self.linear_map, self.eps)
            self._u.copy_(u)
            self._v.copy_(v)
        if not torch.compiler.is_compiling():
            remember_call(self, None, (u, v))
        return u, v

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"{self.linear_map}, n_power_iterations={self.n_power_iterations}"


def _output_dim(module: nn.Module, weight: Tensor, dim: int | None) -> int:
    if dim is None:
        return 1 if isinstance(module, _ConvTransposeNd) else 0
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"spectral_norm: dim must be a dim of the weight {list(weight.shape)}, got {dim}.")
    return dim


def _convolution_map(
    module: nn.Module, name: str, dim: int | None, input_shape: Sequence[int] | None
) -> ConvolutionMap:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or name != "weight":
        raise TypeError(
            f'spectral_norm: norm="operator" takes the weight of a Conv1d, Conv2d or Conv3d, got {name!r} of '
            f'{type(module).__name__}. For a linear layer the matrix norm is the operator norm: use norm="matrix".'
        )
    if dim is not None:
        raise ValueError(f'spectral_norm: dim goes with norm="matrix", got dim={dim} with norm="operator".')
    spatial = len(module.kernel_size)
    if input_shape is None or len(input_shape) != spatial or min(input_shape) < 1:
        got = None if input_shape is None else list(input_shape)
        raise ValueError(
            f'spectral_norm: norm="operator" needs the spatial size of the input, {spatial} positive numbers; got '
            f"input_shape={got}. Use the largest maps that the layer will see."
        )
    if module.padding_mode != "zeros":
        raise ValueError(
            f'spectral_norm: norm="operator" is for zero padding, got padding_mode={module.padding_mode!r}. Use '
            'padding_mode="zeros" or norm="matrix".'
        )
    padding: Any = module._reversed_padding_repeated_twice
    return ConvolutionMap(
        module.in_channels,
        tuple(input_shape),
        tuple(module.stride),
        tuple(padding),
        tuple(module.dilation),
        module.groups,
    )
