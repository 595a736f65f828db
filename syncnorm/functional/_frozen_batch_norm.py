"""Batch norm that is a fixed affine map per channel: running statistics in training too, and nothing moves."""

from torch import Tensor

from syncnorm.functional._sync_batch_norm import evaluate, validate

__all__ = ["frozen_batch_norm"]


def frozen_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_dims: tuple[int, ...] | None = None,
) -> Tensor:
    """Map by y = γ(x - μ)/√(σ² + ε) + β with the running μ and σ²; the gradient reaches the input alone.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout.
        running_mean: ``[C]``.
        running_var: ``[C]``.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        eps: Added to the variance.
        input_dims: Numbers of dims that ``input`` may have; at least 2 by default.

    Returns:
        Tensor like ``input``.

    Raises:
        ValueError: If the input does not fit.
        TypeError: If the input is not floating point.
    """
    validate(input, running_mean.numel(), input_dims)
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    return evaluate(input, running_mean, running_var, weight, bias, eps)
