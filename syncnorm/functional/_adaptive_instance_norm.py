"""Adaptive instance norm: the mean and spread of each channel of one image, given to another."""

# N batch, C channels

from torch import Tensor

from syncnorm.functional._samples import instance_moments, normalize_samples

__all__ = ["adaptive_instance_norm"]


def adaptive_instance_norm(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """Give ``content`` the channel statistics of ``style``: ``y = σ(style)·(content - μ(content))/σ(content) + μ(style)``.

    Means and biased variances are over the space of each sample and channel; σ = √(variance + eps) on both sides, so that
    content in its own style is unchanged. Published code takes the unbiased variance of the style, which is larger by
    S/(S - 1) for S values. A map of a single value has no spread: as content it becomes μ(style).

    Args:
        content: ``[N, C, *]``, any floating dtype and layout.
        style: ``[N, C, *]``, or ``[1, C, *]`` for one style for all; of any size and number of spatial dims.
        eps: Added to the variances.

    Returns:
        Tensor like ``content``, in its dtype; statistics are at least float32.

    Raises:
        ValueError: If the shapes do not fit, or the style has no values.
        TypeError: If either is not floating point.

    Example:
        >>> content, style = torch.tensor([[[-1.0, 1.0]]]), torch.tensor([[[3.0, 3.0, 7.0, 7.0]]])
        >>> adaptive_instance_norm(content, style).round(decimals=3)
        tensor([[[3., 7.]]])

    Reference: Huang & Belongie (2017), arXiv:1703.06868, equation 8.
    """
    for name, value in (("content", content), ("style", style)):
        if value.dim() < 2:
            raise ValueError(
                f"adaptive_instance_norm: {name} must be [N, C, *] of at least 2 dims, got {list(value.shape)}."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"adaptive_instance_norm: {name} must be floating point, got {value.dtype}. Convert it, for example with "
                f"{name}.float()."
            )
    n, c = content.shape[:2]
    if style.size(1) != c or style.size(0) not in (1, n):
        raise ValueError(
            f"adaptive_instance_norm: style must be [N, C, *] with N = {n} (or 1) and C = {c} as content "
            f"{list(content.shape)} has, got {list(style.shape)}."
        )
    if content.numel() and not style.numel():
        raise ValueError(
            f"adaptive_instance_norm: a style without values has no statistics, got {list(style.shape)}. Leave those "
            "samples out of the batch."
        )
    mean, var = instance_moments(content)
    style_mean, style_var = instance_moments(style)
    scale = (var + eps).rsqrt() * (style_var + eps).sqrt()
    return normalize_samples(content, mean, scale, style_mean)
