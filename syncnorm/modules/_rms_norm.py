"""RMS norm, whole and partial, over the last dims or over channels."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor, nn

from syncnorm.functional._layer_norm import normalized_shape
from syncnorm.functional._rms_norm import check_part, rms_norm
from syncnorm.kernels.rows import check_row_backend

__all__ = ["RMSNorm"]


class RMSNorm(nn.RMSNorm):
    """Divide features by their root mean square; see :func:`syncnorm.functional.rms_norm`.

    State-dict keys are those of ``nn.RMSNorm``. Does not depend on the batch; the same in training and evaluation.

    Args:
        dim: Number of features, or the sizes of the last dims, which are then normalised together.
        eps: Added to the mean square. None for the precision of the statistics, which is at least float32.
        elementwise_affine: Learn a weight per feature.
        device: Of the weight.
        dtype: Of the weight.
        p: Share of the features that the RMS is taken over (partial RMS norm; the paper uses 0.0625).
        channel_dim: Where the features are, if not last: 1 for ``[N, C, *]``, of any layout.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Shape:
        Input ``[*, dim]``, or with ``dim`` at ``channel_dim``; output the same. With a residual like the input,
        ``layer(x, residual)``, a pair: the norm of ``x + residual``, and that sum.

    Example:
        >>> RMSNorm(64, p=0.0625)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])

    Reference: Zhang & Sennrich (2019), equation 4; section 5 for the partial form.
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        p: float = 1.0,
        channel_dim: int = -1,
        backend: str = "auto",
    ) -> None:
        shape = normalized_shape(dim)
        check_part("RMSNorm", p)
        if channel_dim != -1 and len(shape) != 1:
            raise ValueError(
                f"RMSNorm: channel_dim={channel_dim} goes with one number of features, got dim={list(shape)}. Give dim "
                "as an int, or leave out channel_dim."
            )
        check_row_backend(backend)
        super().__init__(list(shape), eps, elementwise_affine, device, dtype)
        self.p, self.channel_dim, self.backend = p, channel_dim, backend

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            p=self.p, channel_dim=self.channel_dim, residual=residual, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = {"p": (self.p, 1), "channel_dim": (self.channel_dim, -1), "backend": (self.backend, "auto")}
        more = [f", {name}={value!r}" for name, (value, default) in options.items() if value != default]
        return super().extra_repr() + "".join(more)
