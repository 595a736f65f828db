"""The one meeting of a layer: a packed float64 row per direction, summed over the ranks of its group.

Forward the row carries the moments and one word of agreement; backward the two sums of the gradient. All ranks receive
the same bits from the same reduction, so their buffers stay bitwise equal.
"""

# R ranks, C channels

import torch
from torch import Tensor

from syncnorm.core.moments import Moments, from_sums, to_sums
from syncnorm.distributed.groups import Group
from syncnorm.distributed.wire import sum_row
from syncnorm.errors import SyncNormMismatch

__all__ = ["exchange_moments", "exchange_row", "exchange_sums", "send_poison"]

# The agreement word of a rank: 0 without a backward to come, 1 with one, POISON if its input was refused. Its sum over R
# ranks is 0 or R if all agree. Exact in float64 for any number of ranks.
_POISON = float(2**32)


def exchange_moments(local: Moments, group: Group, *, needs_backward: bool) -> Moments:
    """Moments over all ranks of ``group``, from those of this rank.

    Args:
        local: This rank's moments, ``mean`` and ``m2`` [C]; count 0 for an empty shard.
        group: The ranks that meet. A group of one gives ``local`` back.
        needs_backward: Whether a backward exchange follows on this rank.

    Raises:
        SyncNormMismatch: On every rank alike, if ranks disagree on the backward to come, or one refused its input. On
            CPU only: on an accelerator the word would have to be read back to the host.
    """
    if group.size == 1:
        return local
    row, count = exchange_row(to_sums(local), group, needs_backward=needs_backward)
    return from_sums(row, count)


def exchange_row(row: Tensor, group: Group, *, needs_backward: bool) -> tuple[Tensor, float | None]:
    """Sum a row whose first word is a count over the ranks, with the word of agreement behind it.

    Args:
        row: float64 ``[2C + 1]``.
        group: The ranks that meet.
        needs_backward: Whether a backward exchange follows on this rank.

    Returns:
        The summed row, and its first word where the host may read it.

    Raises:
        SyncNormMismatch: As :func:`exchange_moments`.
    """
    if group.size == 1:
        return row, None
    row = sum_row(torch.cat([row, row.new_full((1,), float(needs_backward))]), group)
    if torch.compiler.is_compiling() or row.device.type != "cpu" or type(row) is not Tensor:
        return row[:-1], None
    words = row.numpy()  # host memory: two reads of it are no tensor operations and wait for nothing
    _check_agreement(float(words[-1]), group, needs_backward)
    return row[:-1], float(words[0])


def exchange_sums(local: Tensor, group: Group) -> Tensor:
    """Sum of ``local`` (float64, any shape) over the ranks of ``group``."""
    return local if group.size == 1 else sum_row(local.contiguous(), group)


def send_poison(num_features: int, device: torch.device, group: Group) -> None:
    """Meet the other ranks in place of a forward that this rank refuses, so that they raise and do not wait."""
    row = torch.zeros(2 * num_features + 2, dtype=torch.float64, device=device)
    row[-1] = _POISON
    sum_row(row, group)


def _check_agreement(word: float, group: Group, needs_backward: bool) -> None:
    if word in (0.0, float(group.size)):
        return
    refused, with_backward = divmod(word, _POISON)
    if refused:
        raise SyncNormMismatch(
            f"{int(refused)} of {group.size} ranks refused their input to this call and raised an error of their own; "
            "look there for the cause. Nothing was changed on this rank."
        )
    raise SyncNormMismatch(
        f"{int(with_backward)} of {group.size} ranks need a backward pass through this call and the others do not (this rank "
        f"{'does' if needs_backward else 'does not'}). All ranks must agree on requires_grad of the input and the affine "
        "parameters, and on torch.no_grad(), or the backward exchange would wait forever."
    )
