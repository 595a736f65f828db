"""Group norm with the channel count first."""

from typing import Any

from torch import Tensor, nn

from syncnorm.core.activation import Activation, find_activation
from syncnorm.functional._group_norm import check_groups, group_norm
from syncnorm.kernels.rows import check_row_backend

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """Normalise each sample over groups of adjacent channels and over space; see :func:`syncnorm.functional.group_norm`.

    State-dict keys are those of ``nn.GroupNorm``. Does not depend on the batch; the same in training and evaluation.
    Exact for channels_last inputs with a large mean, where torch's CPU kernel is not; a group of one value gives β.

    Args:
        num_channels: C, the size of dim 1 of the input. Comes first, unlike in torch.
        num_groups: G, a divisor of C.
        eps: Added to the variance.
        affine: Learn a weight and a bias per channel.
        device: Of the parameters.
        dtype: Of the parameters.
        bias: With ``affine``, whether to learn the bias too.
        activation: Applied last: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"`` (the exact form), or None. Nothing
            is kept for it until the backward.
        negative_slope: Of ``"leaky_relu"``.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If G does not divide C, or the activation or the backend is unknown.

    Example:
        >>> GroupNorm(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])

    Reference: Wu & He (2018), equations 1, 2 and 7.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        backend: str = "auto",
    ) -> None:
        if num_groups > num_channels > 0 and num_groups % num_channels == 0:
            raise ValueError(
                f"GroupNorm({num_channels}, {num_groups}): the number of channels comes first, unlike in torch, and "
                f"{num_channels} channels are fewer than {num_groups} groups. If {num_channels} groups are meant, "
                f"GroupNorm({num_groups}, {num_channels})."
            )
        check_groups("GroupNorm", num_channels, num_groups)
        check_row_backend(backend)
        find_activation(activation, negative_slope)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation, self.negative_slope, self.backend = activation, negative_slope, backend

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor, *, activation: Activation | None = None) -> Tensor:
        """Normalise ``input`` [N, C, *] and apply the layer's activation, or for this call another."""
        own = activation or find_activation(self.activation, self.negative_slope)
        name, slope = own or (None, 0.0)
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            activation=name, negative_slope=slope, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}"
        text += "" if self.bias is not None or not self.affine else ", bias=False"
        text += "" if self.activation is None else f", activation={self.activation!r}"
        text += f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return text + ("" if self.backend == "auto" else f", backend={self.backend!r}")
