"""Features brought to mean 0 and spread 1, or into a range, by statistics that are given; and back."""

import torch
from torch import Tensor

__all__ = ["check_features", "destandardize", "min_max_scale", "standardize", "undo_min_max_scale"]


def standardize(input: Tensor, mean: Tensor, std: Tensor, clip: float | None = None) -> Tensor:
    """Compute ``(x - mean) / std`` over the last dims, in float64.

    In float32, ``x - mean`` has lost its digits already where the mean is large beside the spread.

    Args:
        input: ``[*, *shape]``, any real dtype.
        mean: float64 ``[*shape]``.
        std: float64 ``[*shape]``, positive.
        clip: Limit the result to ``[-clip, clip]``.

    Returns:
        Tensor like ``input``, in its dtype if that is floating point, else in torch's default dtype.

    Raises:
        ValueError: If the last dims of ``input`` are not those of ``mean``.
        TypeError: If ``input`` is complex.
    """
    check_features(input, mean.shape)
    y = (input.double() - mean) / std
    return _like(y if clip is None else y.clamp(-clip, clip), input)


def destandardize(input: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of :func:`standardize` without its clip; same arguments."""
    check_features(input, mean.shape)
    return _like(torch.addcmul(mean, input.double(), std), input)


def min_max_scale(input: Tensor, minimum: Tensor, maximum: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Map ``[minimum, maximum]`` of each feature linearly onto ``[low, high]``; what lies outside lands outside.

    A feature whose minimum is its maximum is moved so that it lies at ``low`` and is not stretched but by ``high - low``.

    Args:
        input: ``[*, *shape]``, any real dtype.
        minimum: float64 ``[*shape]``.
        maximum: float64 ``[*shape]``.
        low: Where the minimum goes.
        high: Where the maximum goes.

    Returns:
        Tensor like ``input``, in its dtype if that is floating point, else in torch's default dtype.

    Raises:
        ValueError: If the last dims of ``input`` are not those of ``minimum``.
        TypeError: If ``input`` is complex.
    """
    check_features(input, minimum.shape)
    return _like((input.double() - minimum) / _width(minimum, maximum) * (high - low) + low, input)


def undo_min_max_scale(input: Tensor, minimum: Tensor, maximum: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The inverse of :func:`min_max_scale`; same arguments."""
    check_features(input, minimum.shape)
    return _like((input.double() - low) / (high - low) * _width(minimum, maximum) + minimum, input)


def check_features(input: Tensor, shape: torch.Size) -> None:
    """Raise unless ``input`` is real and its last dims are ``shape``."""
    if input.is_complex():
        raise TypeError(f"expected real values, got {input.dtype}. Use torch.view_as_real, or the modulus.")
    if input.dim() < len(shape) or input.shape[input.dim() - len(shape) :] != shape:
        wanted = ", ".join(["*", *map(str, shape)])
        raise ValueError(
            f"expected an input [{wanted}], with the features last, got {list(input.shape)}. "
            "Where they are not last, use x.movedim(dim, -1)."
        )


def _width(minimum: Tensor, maximum: Tensor) -> Tensor:
    width = maximum - minimum
    return torch.where(width > 0, width, 1.0)


def _like(y: Tensor, input: Tensor) -> Tensor:
    return y.to(input.dtype if input.is_floating_point() else torch.get_default_dtype())
