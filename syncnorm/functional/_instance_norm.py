"""Instance norm: group norm with one channel per group, and torch's optional running statistics."""

# N batch, C channels

import torch
from torch import Tensor
from torch.nn import functional

from syncnorm.functional._checkpoint import is_recomputing
from syncnorm.functional._group_norm import group_norm
from syncnorm.functional._inputs import accumulate_dtype, check_channels, same_dtype

__all__ = ["instance_norm"]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Normalise each channel of each sample over space: ``y = (x - μ) / sqrt(σ² + eps) · γ + β``.

    Where there is one value per channel (1×1 maps) the output is β and the input's gradient 0, so that no signal passes;
    torch raises there, in evaluation too.

    Args:
        input: ``[N, C, *]`` with at least one spatial dim, any floating dtype, any layout; N may be 0.
        running_mean: ``[C]`` or None. Updated in place with the mean over samples of their means.
        running_var: ``[C]`` or None. Updated in place with the mean over samples of their unbiased variances.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        use_input_stats: False to normalise by the running statistics and leave them alone.
        momentum: Weight of the new batch in the running statistics.
        eps: Added to the (biased) variance.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not; the running statistics are
            used by torch's own batch norm.

    Returns:
        Tensor like ``input``, in its dtype and layout. Statistics are at least float32.

    Raises:
        ValueError: If the input has other channels than the vectors, no spatial dim, or running statistics are to be used
            that are not there or updated from one value per channel.
        TypeError: If the input is not floating point.

    Reference: Ulyanov, Vedaldi & Lempitsky (2016).
    """
    known = next((t.numel() for t in (running_mean, weight, bias) if t is not None), None)
    check_channels("instance_norm", input, known)
    if input.dim() < 3:
        raise ValueError(f"instance_norm: expected an input [N, C, *] with a spatial dim, got {list(input.shape)}.")
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError(
                "instance_norm: use_input_stats=False needs running_mean and running_var, got None. Give both, or leave "
                "use_input_stats True."
            )
        return _by_running(input, running_mean, running_var, weight, bias, eps)
    if running_mean is not None and running_var is not None and input.numel() and not is_recomputing():
        _update(input, running_mean, running_var, momentum)
    return group_norm(input, input.size(1), weight, bias, eps, backend=backend)


def _by_running(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    x = input
    if not same_dtype(input, mean, var, weight, bias):
        dtype = accumulate_dtype(input.dtype)
        x, mean, var = input.to(dtype), mean.to(dtype), var.to(dtype)
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps).to(input.dtype)


@torch.no_grad()
def _update(input: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    values = input.shape[2:].numel()
    if values == 1:
        raise ValueError(
            f"instance_norm: a running variance needs more than 1 value per channel, got an input {list(input.shape)}. "
            "Use larger maps, or track_running_stats=False."
        )
    var_NC, mean_NC = torch.var_mean(input.detach().to(accumulate_dtype(input.dtype)).flatten(2), 2)
    running_mean.lerp_(mean_NC.mean(0).to(running_mean.dtype), momentum)
    running_var.lerp_(var_NC.mean(0).to(running_var.dtype), momentum)
