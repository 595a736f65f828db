"""Features of mean 0 and variance 1, fitted over all ranks."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from syncnorm.core.features import add_moments, feature_moments
from syncnorm.core.moments import Moments
from syncnorm.functional._standardize import destandardize, standardize
from syncnorm.modules._fitted import Fitted

__all__ = ["Standardize"]


class Standardize(Fitted):
    """Scale features to mean 0 and variance 1, by statistics fitted over all ranks in one pass.

    scikit-learn's ``StandardScaler`` as a module: the statistics are buffers, so they are in the checkpoint and move with
    the model, and the inverse is at hand where predictions leave it. They are float64 and stay so. A feature that never
    varies is centred and not scaled. Evaluation and training are the same; only :meth:`fit` changes anything.

    Args:
        shape: Number of features, or the shape of one sample; the last dims of the input.
        with_mean: Subtract the mean.
        with_std: Divide by the standard deviation.
        process_group: Whose data is fitted, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of the buffers.

    Shape:
        Input ``[*, *shape]``, real; output the same, in the input's dtype or, for integers, in torch's default one.

    Attributes:
        count: Number of samples, float64 scalar.
        mean: float64 ``[*shape]``.
        var: Biased variance, float64 ``[*shape]``.

    Raises:
        SyncNormError: If it is used before it is fitted.
        ValueError: If the last dims of the input are not ``shape``.

    Example:
        >>> scale = Standardize(2).fit([torch.tensor([[0.0, 7.0]]), torch.tensor([[2.0, 7.0]])])
        >>> scale(torch.tensor([[3.0, 7.0]]))
        tensor([[2., 0.]])
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        with_mean: bool = True,
        with_std: bool = True,
        process_group: object = None,
        device: Any = None,
    ) -> None:
        super().__init__(shape, ("mean", "var"), (0.0, 1.0), process_group, device)
        self.with_mean, self.with_std = with_mean, with_std

    @property
    def std(self) -> Tensor:
        """What features are divided by, float64 ``[*shape]``; 1 for those that never vary."""
        return torch.where(self.var > 0, self.var.sqrt(), 1.0)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean = self.mean if self.with_mean else torch.zeros_like(self.mean)
        return mean, self.std if self.with_std else torch.ones_like(self.var)

    def _scale(self, input: Tensor) -> Tensor:
        return standardize(input, *self._statistics())

    def _unscale(self, input: Tensor) -> Tensor:
        return destandardize(input, *self._statistics())

    def _add(self, row: tuple[float, Tensor, Tensor], x: Tensor) -> tuple[float, Tensor, Tensor]:
        return self._fold([row, feature_moments(x)])

    def _merge(self, parts: list[tuple[float, Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
        count, mean, m2 = self._fold(parts)
        return count, mean, m2 / count

    @staticmethod
    def _fold(parts: list[Any]) -> tuple[float, Tensor, Tensor]:
        merged = reduce(add_moments, (Moments(*part) for part in parts))
        return float(merged.count), merged.mean, merged.m2

    def _settings(self) -> list[str]:
        return [f"{name}=False" for name in ("with_mean", "with_std") if not getattr(self, name)]
