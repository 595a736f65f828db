"""Layer norm over the last dims or over channels."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor, nn

from syncnorm.functional._layer_norm import layer_norm, normalized_shape
from syncnorm.kernels.rows import check_row_backend

__all__ = ["LayerNorm"]


class LayerNorm(nn.LayerNorm):
    """Normalise each sample or position over its features; see :func:`syncnorm.functional.layer_norm`.

    State-dict keys are those of ``nn.LayerNorm``. Does not depend on the batch; the same in training and evaluation.

    Args:
        dim: Number of features, or the sizes of the last dims, which are then normalised together.
        eps: Added to the variance.
        elementwise_affine: Learn a weight and a bias per feature.
        bias: Whether to learn the bias too.
        device: Of the parameters.
        dtype: Of the parameters.
        channel_dim: Where the features are, if not last: 1 for ``[N, C, *]``, of any layout.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Shape:
        Input ``[*, dim]``, or with ``dim`` at ``channel_dim``; output the same. With a residual like the input,
        ``layer(x, residual)``, a pair: the norm of ``x + residual``, and that sum.

    Example:
        >>> LayerNorm(8, channel_dim=1)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Reference: Ba, Kiros & Hinton (2016), equation 3.
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        channel_dim: int = -1,
        backend: str = "auto",
    ) -> None:
        shape = normalized_shape(dim)
        if channel_dim != -1 and len(shape) != 1:
            raise ValueError(
                f"LayerNorm: channel_dim={channel_dim} goes with one number of features, got dim={list(shape)}. To "
                "normalise over channels and space, whatever its size, use GroupNorm(num_channels, 1)."
            )
        check_row_backend(backend)
        super().__init__(list(shape), eps, elementwise_affine, bias, device, dtype)
        self.channel_dim, self.backend = channel_dim, backend

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            channel_dim=self.channel_dim, residual=residual, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        more = "" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}"
        return super().extra_repr() + more + ("" if self.backend == "auto" else f", backend={self.backend!r}")
