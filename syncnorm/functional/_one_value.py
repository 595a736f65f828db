"""The one batch that has no variance: a single value per channel on all ranks together."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ONE_VALUE", "refuse_one_value"]

ONE_VALUE = "expected more than 1 value per channel in the whole group when training, got 1"


def refuse_one_value(count: Tensor | float, local: Tensor | float, shape: Sequence[int] | None = None) -> None:
    """Raise ValueError if ``count``, the values per channel on all ranks, is 1; the same on every rank.

    A rank with two values knows the answer, so a count on an accelerator is read only where this rank has at most one. A
    compiled graph cannot raise: there the caller asserts ``count != 1`` in the graph.

    Args:
        count: Values per channel on all ranks.
        local: Values per channel on this rank.
        shape: Of this rank's input, for the message.
    """
    if not isinstance(local, Tensor) and local > 1:
        return
    if isinstance(count, Tensor):
        if torch.compiler.is_compiling() or (count.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        count = count.item()
    if count == 1:
        came = "" if shape is None else f" (this rank's input is {list(shape)})"
        raise ValueError(
            f"{ONE_VALUE}{came}. Variance needs two: use a larger batch or map, more ranks per group, or a norm that does not "
            "use the batch (syncnorm.convert(model, to='group_norm'))."
        )
