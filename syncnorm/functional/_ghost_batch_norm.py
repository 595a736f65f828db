"""Ghost batch normalisation: statistics of a chosen number of samples, whatever the batch of a rank."""

import torch
from torch import Tensor

from syncnorm.core.layout import count_per_channel
from syncnorm.core.moments import Moments, at_least_one
from syncnorm.core.running import RunningStatistics
from syncnorm.distributed.exchange import exchange_row
from syncnorm.distributed.groups import LOCAL, Group, group_spec, resolve
from syncnorm.distributed.ledger import Call, begin_call
from syncnorm.errors import SyncNormPeerLost, SyncNormTimeout
from syncnorm.functional._checkpoint import is_recomputing, unseen_by_selective_checkpointing
from syncnorm.functional._ghosts import normalize_ghosts
from syncnorm.functional._sync_batch_norm import enter, evaluate, needs_grad, tell_others, validate
from syncnorm.functional._walk import Walk
from syncnorm.kernels.vectors import update_running

__all__ = ["ghost_batch_norm"]


def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    virtual_batch_size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    group: object = "world",
    ghost_group: Group = LOCAL,
    backend: str = "auto",
    num_features: int | None = None,
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
) -> Tensor:
    """Normalise every ``virtual_batch_size`` samples by their own statistics; share γ, β and the running statistics.

    The batch of a rank is cut into ghosts of ``virtual_batch_size`` samples. The last may be smaller; a last one with a
    single value per channel joins the one before it. With a ``ghost_group`` of several ranks a ghost is the batch of these
    ranks together, and nothing is cut.

    The running statistics are the averages over the ghosts of *all* ranks of ``group``, of their means and of their
    unbiased variances, weighted by samples: what a ghost is normalised by on average. (One update per step; the paper
    updates once per ghost.) That takes one all-reduce forward; backward there is none but within a ``ghost_group``.

    Args:
        input: ``[N, C, *]``, any floating dtype and layout; shards may be uneven or empty.
        running_mean: ``[C]`` or None; updated in place when training.
        running_var: ``[C]`` or None.
        virtual_batch_size: Samples per ghost.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        training: Use and update the statistics of the batch; otherwise evaluation, as batch norm.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        eps: Added to the variance.
        num_batches_tracked: int64 scalar, counted up in place.
        group: The ranks that share running statistics, as in :func:`sync_batch_norm`.
        ghost_group: The ranks that make up one ghost.
        backend: As in :func:`sync_batch_norm`.
        num_features: As in :func:`sync_batch_norm`.
        input_dims: As in :func:`sync_batch_norm`.
        site: As in :func:`sync_batch_norm`.

    Returns:
        Tensor like ``input``.

    Raises:
        ValueError: If the input does not fit, a whole ghost has one value per channel, or ``virtual_batch_size`` is below 1.
        TypeError: If the input is not floating point.
        SyncNormError: As :func:`sync_batch_norm`.
        SyncNormMismatch: As :func:`sync_batch_norm`.

    Reference: Hoffer, Hubara & Soudry (2017), arXiv:1705.08741, algorithm 1.
    """
    if not training:
        validate(input, num_features, input_dims)
        return evaluate(input, running_mean, running_var, weight, bias, eps)
    ranks = group if isinstance(group, Group) else resolve(group_spec(group))
    tracks = (running_mean is not None or num_batches_tracked is not None) and not is_recomputing()
    try:
        enter(input, eps, ghost_group, num_features, input_dims, site, backend)
        if virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size is a number of samples, at least 1; got {virtual_batch_size}.")
        sizes = _cut(input, virtual_batch_size) if ghost_group.size == 1 else [input.size(0)]
        if ghost_group.size == 1 and count_per_channel(input) == 1:
            raise ValueError(
                f"expected more than 1 value per channel in a ghost when training, got an input {list(input.shape)}. Variance "
                "needs two: use a larger batch, or one ghost over several ranks (a larger virtual_batch_size)."
            )
        walk = Walk(eps, ghost_group, backend, needs_grad(input, weight, bias), site)
        output, moments = normalize_ghosts(input, sizes, weight, bias, walk)
    except (SyncNormPeerLost, SyncNormTimeout):
        raise  # nobody is left to tell
    except (ValueError, TypeError, RuntimeError):
        if tracks:  # the other ghosts go on to the running statistics
            tell_others(input, ranks, num_features, site)
        raise
    if tracks:
        running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum)
        known = None if ranks.size > 1 or torch.compiler.is_compiling() else float(count_per_channel(input))
        call = begin_call(site, ranks, input)
        with unseen_by_selective_checkpointing():
            averaged = _average(moments, ranks, call, share=1 / ghost_group.size, known=known)
            update_running(running, averaged, backend)
    return output


def _cut(input: Tensor, size: int) -> list[int]:
    """Samples of each ghost: ``size``, and so that none has a single value per channel unless the whole input has."""
    samples, values = input.size(0), count_per_channel(input[:1])
    if samples <= size:
        return [samples]
    sizes = [size] * (samples // size)
    rest = samples % size
    if rest * values == 1 or size * values == 1:
        if size * values == 1:
            raise ValueError(
                f"virtual_batch_size={size} leaves one value per channel in a ghost of an input {list(input.shape)}; "
                "variance needs two. Use a larger one."
            )
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


@torch.no_grad()
def _average(ghosts: Moments, ranks: Group, call: Call | None, *, share: float, known: float | None) -> Moments:
    """Moments [C] whose mean and unbiased variance are the averages over all ghosts [K, C] of all ranks.

    ``known`` is the count of a group of one, where the host knows it.
    """
    assert isinstance(ghosts.count, Tensor)
    weight_K = ghosts.count * share  # ghosts that several ranks share count once: each rank brings its share
    mean, var = weight_K @ ghosts.mean, (weight_K / (ghosts.count - 1).clamp(min=1)) @ ghosts.m2
    count: Tensor | float | None = known
    if count is None:
        row = torch.cat([weight_K.sum().reshape(1), mean, var])
        row, known = exchange_row(row, ranks, needs_backward=False, call=call)
        count = row[0] if known is None else known
        mean, var = row[1:].view(2, -1).unbind(0)
    divisor = at_least_one(count)
    return Moments(count, mean / divisor, var * ((count - 1) / divisor))
