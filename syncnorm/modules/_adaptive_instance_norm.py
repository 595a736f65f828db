"""Adaptive instance norm as a layer without state."""

from torch import Tensor, nn

from syncnorm.functional._adaptive_instance_norm import adaptive_instance_norm

__all__ = ["AdaptiveInstanceNorm"]


class AdaptiveInstanceNorm(nn.Module):
    """Give one image's features the channel statistics of another's; see :func:`syncnorm.functional.adaptive_instance_norm`.

    Has no parameters and no buffers; does not depend on the batch; the same in training and evaluation. Where the style is
    a vector and not an image, use :class:`ConditionalNorm` around an instance norm.

    Args:
        eps: Added to the variances.

    Shape:
        Content ``[N, C, *]`` and style ``[N, C, *]`` or ``[1, C, *]``, whose spatial sizes may differ; output like content.

    Raises:
        ValueError: If the shapes do not fit, or the style has no values.
        TypeError: If either is not floating point.

    Example:
        >>> AdaptiveInstanceNorm()(torch.randn(2, 8, 16, 16), torch.randn(1, 8, 32, 20)).shape
        torch.Size([2, 8, 16, 16])

    Reference: Huang & Belongie (2017), arXiv:1703.06868, equation 8.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}.")
        self.eps = eps

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """``content`` with the mean and standard deviation per channel of ``style``."""
        return adaptive_instance_norm(content, style, self.eps)

    def extra_repr(self) -> str:
        """The only setting."""
        return f"eps={self.eps}"
