"""Group norm with the channel count first."""

from typing import Any

from torch import Tensor, nn

from syncnorm.functional._group_norm import check_groups, group_norm

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

    Shape:
        Input ``[N, C, *]``; output the same.

    Raises:
        ValueError: If G does not divide C.

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
    ) -> None:
        check_groups("GroupNorm", num_channels, num_groups)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None or not self.affine else ", bias=False"
        return f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}{bias}"
