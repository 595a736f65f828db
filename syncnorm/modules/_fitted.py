"""Base of the scalers that are fitted once: one pass over each rank's batches, one meeting at the end."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from syncnorm.distributed.gather import gather_rows, send_refusal
from syncnorm.distributed.ledger import begin_call
from syncnorm.errors import SyncNormError
from syncnorm.functional._standardize import check_features
from syncnorm.modules._over_ranks import OverRanks
from syncnorm.modules._running_norm import feature_shape

__all__ = ["Fitted"]


class Fitted(OverRanks):
    """Two float64 vectors per feature and a count, fitted over the ranks of a group. Subclasses say which two.

    Args:
        shape: Number of features, or the shape of one sample.
        names: Names of the two buffers.
        fills: What they hold before the fit.
        process_group: Whose data is fitted.
        device: Of the buffers.
    """

    count: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        names: tuple[str, str],
        fills: tuple[float, float],
        process_group: object,
        device: Any,
    ) -> None:
        super().__init__(process_group)
        self.shape, self._names, self._fills = feature_shape(shape), names, fills
        self.register_buffer("count", torch.empty((), dtype=torch.float64, device=device))
        for name in names:
            self.register_buffer(name, torch.empty(self.shape, dtype=torch.float64, device=device))
        self.reset_parameters()

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has been called, or a fitted state loaded."""
        return self._is_fitted

    def fit(self, batches: Tensor | Iterable[Any]) -> Self:
        """Take the statistics of all samples of all ranks, in place of those of an earlier fit.

        Ranks may bring different numbers of batches, and none; they meet once, when each has seen its own.

        Args:
            batches: A tensor ``[*, *shape]``; or an iterable, such as a DataLoader, of such tensors or of tuples or lists
                that begin with one. Of other batches: ``fit(batch["x"] for batch in loader)``.

        Returns:
            This module.

        Raises:
            ValueError: If no rank has a sample, a sample is not finite, or shapes do not fit. Nothing has changed then.
            TypeError: If a batch is not of that kind.
            SyncNormMismatch: If another rank raised an error over its batches.
        """
        group = self._group()
        try:
            row = self._named(self._read, [batches] if isinstance(batches, Tensor) else batches)
        except Exception:
            send_refusal(2 * self._first.numel() + 1, self.count.device, group)
            raise
        rows = gather_rows(row, group, begin_call(self, group, row.view(1, -1)))
        return self._named(self._take, rows)

    def reset_parameters(self) -> None:
        """Forget what was fitted."""
        for name, fill in zip(("count", *self._names), (0.0, *self._fills), strict=True):
            self.get_buffer(name).fill_(fill)
        self._is_fitted = False

    def forward(self, input: Tensor) -> Tensor:
        """Scale ``input`` by what was fitted."""
        self._check_fitted()
        return self._named(self._scale, input)

    def inverse(self, input: Tensor) -> Tensor:
        """The inverse of the forward."""
        self._check_fitted()
        return self._named(self._unscale, input)

    def extra_repr(self) -> str:
        """The shape, and whether it is fitted."""
        return ", ".join([*map(str, self.shape), *self._settings(), *([] if self._is_fitted else ["not fitted"])])

    @property
    def _first(self) -> Tensor:
        return self.get_buffer(self._names[0])

    @torch.no_grad()
    def _read(self, batches: Iterable[Any]) -> Tensor:
        """The row ``[count, first, second]`` of all samples of this rank."""
        device = self.count.device
        first, second = torch.zeros(2, self._first.numel(), dtype=torch.float64, device=device).unbind(0)
        row = (0.0, first, second)
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"fit expects batches that are tensors or tuples that begin with one, got {type(x).__name__}. "
                    'Choose the tensor: fit(batch["x"] for batch in loader).'
                )
            check_features(x, self._first.shape)
            flat = x.detach().to(device).double().reshape(-1, self._first.numel())
            if len(flat):
                row = self._add(row, flat)
        return torch.cat([first.new_full((1,), row[0]), row[1], row[2]])

    @torch.no_grad()
    def _take(self, rows: Tensor) -> Self:
        """Keep the statistics of the rows of all ranks."""
        parts = [(float(row[0]), *row[1:].view(2, -1).unbind(0)) for row in rows if row[0] > 0]
        if not parts:
            raise ValueError("fit needs at least one sample on some rank, got none. Check the loaders' lengths.")
        count, first, second = self._merge(parts)
        broken = (~(first.isfinite() & second.isfinite())).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"samples hold NaN or infinite values, or overflow when squared, in features {broken[:8]} (flattened) on "
                "some rank. Clean or drop them first; nothing was changed."
            )
        self.count.fill_(count)
        for name, value in zip(self._names, (first, second), strict=True):
            buffer = self.get_buffer(name)
            buffer.copy_(value.view_as(buffer))
        self._is_fitted = True
        return self

    def _add(self, row: tuple[float, Tensor, Tensor], x: Tensor) -> tuple[float, Tensor, Tensor]:
        """``row`` with the samples ``x`` [N, F], of which there is at least one."""
        raise NotImplementedError

    def _merge(self, parts: list[tuple[float, Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
        """Count and the two buffers from the rows of ranks that have samples."""
        raise NotImplementedError

    def _scale(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _unscale(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _settings(self) -> list[str]:
        return []

    def _check_fitted(self) -> None:
        if not self._is_fitted:
            raise SyncNormError(
                f"{type(self).__name__} has no statistics yet. Call fit(batches) on every rank, or load a fitted state dict."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        count = state_dict.get(f"{prefix}count")
        if count is not None:
            self._is_fitted = bool(count > 0)
