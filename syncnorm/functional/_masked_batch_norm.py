"""Batch normalisation whose statistics leave out padding, or weigh their samples, over the ranks of a group."""

import torch
from torch import Tensor

from syncnorm.core.layout import accumulate_dtype
from syncnorm.core.running import RunningStatistics
from syncnorm.functional._nonfinite import OnNonFinite, check_policy
from syncnorm.functional._samples import beside
from syncnorm.functional._sync_batch_norm import check_pending, enter, evaluate, tell_others, validate
from syncnorm.functional._sync_moments import sync_moments

__all__ = ["masked_batch_norm"]


def masked_batch_norm(
    input: Tensor,
    mask: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    group: object = "world",
    pending: Tensor | None = None,
    accumulate: int = 1,
    num_features: int | None = None,
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
    on_nonfinite: OnNonFinite = "propagate",
) -> Tensor:
    """Batch normalisation by the statistics of the values that ``mask`` lets count, over all ranks of a group.

    μ = Σw·x/Σw and σ² = Σw(x - μ)²/Σw with w the mask, each summed over all ranks: their true counts, whatever share of a
    rank's values is padding. The running variance is Σw(x - μ)²/(Σw - 1). *Every* value is normalised, masked or not, and
    the gradient is that of this function: multiply the output by the mask where padding must stay zero. Values that do not
    count may be anything, also NaN, which stays where it is and, if the loss leaves it out, in no gradient. One all-reduce
    forward and one backward. Plain tensor operations, so slower than the layer without a mask.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        mask: Bool, or nonnegative weights, whose sum over all ranks is at least 1: ``[N]``, ``[N, *]`` as the input without
            its channels, or ``[N, 1, *]``. In evaluation it has no effect.
        running_mean: ``[C]`` or None; updated in place when training.
        running_var: ``[C]`` or None.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        training: Use and update the statistics of the batch; otherwise evaluation, as batch norm.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        eps: Added to the variance.
        num_batches_tracked: int64 scalar, counted up in place.
        group: As in :func:`sync_batch_norm`.
        pending: As in :func:`sync_batch_norm`.
        accumulate: As in :func:`sync_batch_norm`.
        num_features: As in :func:`sync_batch_norm`.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.
        on_nonfinite: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``.

    Raises:
        ValueError: If the input or the mask does not fit, or a single value counts on all ranks together.
        TypeError: If the input is not floating point, or the mask complex.
    """
    if not training:
        validate(input, num_features, input_dims)
        _weights(input, mask)
        return evaluate(input, running_mean, running_var, weight, bias, eps)
    ranks = enter(input, eps, group, num_features, input_dims, site)
    try:
        check_policy(on_nonfinite)
        if accumulate != 1:
            check_pending(pending, accumulate, running_mean)
        weights = _weights(input, mask)
        # What is not finite and does not count: its gradient, though multiplied by 0, would make γ's NaN.
        counts = (weights > 0) | input.isfinite()
        x = torch.where(counts, input, 0.0)
    except (ValueError, TypeError, RuntimeError):
        tell_others(input, ranks, site=site)
        raise
    running = None
    if running_mean is not None or num_batches_tracked is not None:
        running = RunningStatistics(
            running_mean, running_var, num_batches_tracked, momentum, pending, accumulate,
            skip_nonfinite=on_nonfinite == "skip_update",
        )  # fmt: skip
    mean, var = sync_moments(
        x, ranks, weights=weights, running=running, site=site, refuse_one_value=True,
        refuses_nonfinite=on_nonfinite == "raise",
    )  # fmt: skip
    wide = accumulate_dtype(input.dtype)
    scale = (var + eps).rsqrt()
    scale = (scale if weight is None else scale * weight).to(wide)
    y = (x.to(wide) - beside(mean.to(wide), x)) * beside(scale, x)
    if bias is not None:
        y = y + beside(bias.to(wide), x)
    return torch.where(counts, y.to(input.dtype), input.detach())


def _weights(input: Tensor, mask: Tensor) -> Tensor:
    """The mask as ``[N, 1, *]``."""
    if mask.is_complex():
        raise TypeError(f"mask must be bool or real weights, got {mask.dtype}.")
    shape = list(input.shape)
    if mask.dim() == input.dim() and mask.size(1) == 1:
        weights = mask
    elif list(mask.shape) == [shape[0], *shape[2:]]:
        weights = mask.unsqueeze(1)
    elif list(mask.shape) == shape[:1]:
        weights = mask.view(-1, *[1] * (input.dim() - 1))
    else:
        weights = mask
    fits = weights.dim() == input.dim() and weights.size(1) == 1
    fits = fits and all(
        m in (1, n) for m, n in zip([weights.size(0), *weights.shape[2:]], [shape[0], *shape[2:]], strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask must be [N], [N, *] or [N, 1, *] for an input [N, C, *]; got a mask {list(mask.shape)} for an input {shape}."
        )
    return weights.detach().expand(shape[0], 1, *shape[2:])
