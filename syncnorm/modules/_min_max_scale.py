"""Features mapped onto a range, fitted over all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncnorm.functional._standardize import min_max_scale, undo_min_max_scale
from syncnorm.modules._fitted import Fitted

__all__ = ["MinMaxScale"]


class MinMaxScale(Fitted):
    """Map each feature from ``[minimum, maximum]``, fitted over all ranks in one pass, onto ``[low, high]``.

    scikit-learn's ``MinMaxScaler`` as a module: the statistics are buffers, so they are in the checkpoint and move with the
    model. They are float64 and stay so. A feature that never varies lies at ``low``. Values outside of what was fitted land
    outside of the range, unless ``clip`` is set; then the inverse cannot bring them back.

    Args:
        shape: Number of features, or the shape of one sample; the last dims of the input.
        low: Where the minimum goes.
        high: Where the maximum goes; above ``low``.
        clip: Limit outputs to the range.
        process_group: Whose data is fitted, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of the buffers.

    Shape:
        Input ``[*, *shape]``, real; output the same, in the input's dtype or, for integers, in torch's default one.

    Attributes:
        count: Number of samples, float64 scalar.
        minimum: float64 ``[*shape]``.
        maximum: float64 ``[*shape]``.

    Raises:
        SyncNormError: If it is used before it is fitted.
        ValueError: If the last dims of the input are not ``shape``, or ``low`` is not below ``high``.

    Example:
        >>> scale = MinMaxScale(1).fit(torch.tensor([[2.0], [6.0]]))
        >>> scale(torch.tensor([[3.0]]))
        tensor([[0.2500]])
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        *,
        clip: bool = False,
        process_group: object = None,
        device: Any = None,
    ) -> None:
        super().__init__(shape, ("minimum", "maximum"), (0.0, 1.0), process_group, device)
        if not low < high:
            raise ValueError(f"low must be below high, got low={low}, high={high}.")
        self.low, self.high, self.clip = low, high, clip

    def _scale(self, input: Tensor) -> Tensor:
        y = min_max_scale(input, self.minimum, self.maximum, self.low, self.high)
        return y.clamp(self.low, self.high) if self.clip else y

    def _unscale(self, input: Tensor) -> Tensor:
        return undo_min_max_scale(input, self.minimum, self.maximum, self.low, self.high)

    def _add(self, row: tuple[float, Tensor, Tensor], x: Tensor) -> tuple[float, Tensor, Tensor]:
        count, low, high = row
        if count == 0:
            return float(len(x)), x.amin(0), x.amax(0)
        return count + len(x), torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))

    def _merge(self, parts: list[tuple[float, Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
        counts, lows, highs = zip(*parts, strict=True)
        return sum(counts), torch.stack(lows).amin(0), torch.stack(highs).amax(0)

    def _settings(self) -> list[str]:
        return [f"low={self.low:g}", f"high={self.high:g}", *(["clip=True"] if self.clip else [])]
