"""Observation normalisation for reinforcement learning: running moments of everything seen, on all ranks and workers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from syncnorm.core.moments import Moments, merge_moments, stack_moments
from syncnorm.distributed.groups import LOCAL
from syncnorm.errors import SyncNormError
from syncnorm.functional._running_norm import (
    merge_running_moments,
    running_norm,
    running_std,
    update_running_moments,
)
from syncnorm.functional._standardize import destandardize, standardize
from syncnorm.modules._over_ranks import OverRanks

__all__ = ["RunningNorm", "feature_shape"]


class RunningNorm(OverRanks):
    """Normalise by the mean and variance of all samples seen so far, on all ranks.

    In training, a forward merges its samples into the moments (one exchange; none in a process of its own) and then
    normalises them; in evaluation, or frozen, it only normalises. The moments are those of exactly the samples that were
    merged, from the first one on: there is no prior to wash out. Until there are two, the variance counts as 1.

    All moments are float64 buffers and stay so whatever the model is cast to. Every rank holds the same bits. Shards may
    be uneven or empty; ranks must make the same calls.

    A worker that is no rank (a process that steps environments) collects with a module of its own and hands it to
    :meth:`merge`. (Its own: what is sent to another process shares its tensors with the sender, so a worker makes a
    ``copy.deepcopy`` of what it was sent and resets that.)

        >>> norm, worker = RunningNorm(2), RunningNorm(2)
        >>> worker.update(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> norm.merge(worker)
        >>> norm.mean
        tensor([1., 3.], dtype=torch.float64)

    Args:
        shape: Number of features, or the shape of one sample.
        eps: Added to the variance.
        clip: Limit outputs to ``[-clip, clip]``; None for no limit.
        process_group: Whose samples are merged, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of the buffers.

    Shape:
        Input ``[*, *shape]``, real; output the same, in the input's dtype or, for integers, in torch's default one.

    Attributes:
        count: Number of samples, float64 ``[1]``.
        mean: float64 ``[*shape]``.
        m2: Sum of squared deviations, float64 ``[*shape]``.
        frozen: Whether the moments are held fixed in training, too.

    Raises:
        ValueError: If the last dims of the input are not ``shape``; or, on CPU, if a sample is not finite (elsewhere such
            an update is left out, as the host would have to wait to see it).
        TypeError: If the input is complex.
        SyncNormMismatch: If another rank refused its input.

    Reference: Chan, Golub & LeVeque (1979) for the merge; Schulman et al. (2017) and its implementations for the use.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        eps: float = 1e-8,
        clip: float | None = 10.0,
        process_group: object = None,
        device: Any = None,
    ) -> None:
        super().__init__(process_group)
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None for no limit; got {clip}.")
        self.shape, self.eps, self.clip, self.frozen = feature_shape(shape), eps, clip, False
        # One dim, because torch.compile (2.13) loses what is written to a float64 tensor without dims.
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64, device=device))
        for name in ("mean", "m2"):
            self.register_buffer(name, torch.zeros(self.shape, dtype=torch.float64, device=device))

    @property
    def var(self) -> Tensor:
        """Biased variance of all samples, float64 ``[*shape]``; 1 for fewer than two of them."""
        return running_std(self.count, self.m2, 0.0).square()

    @property
    def std(self) -> Tensor:
        """What outputs were divided by, ``sqrt(var + eps)``, float64 ``[*shape]``."""
        return running_std(self.count, self.m2, self.eps)

    @property
    def moments(self) -> Moments:
        """A copy of the moments, flattened to ``[F]``, for the :meth:`merge` of another."""
        return Moments(self.count[0].clone(), self.mean.flatten().clone(), self.m2.flatten().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Merge ``input`` when training and not frozen, and normalise it."""
        training = self.training and not self.frozen and self._tracks
        group = self._group() if training else LOCAL
        return self._named(
            running_norm, input, self.count, self.mean, self.m2, training, self.eps, self.clip, group=group, site=self
        )

    def update(self, input: Tensor) -> None:
        """Merge the samples of ``input`` on all ranks, whatever the training flag.

        Raises:
            SyncNormError: If frozen.
        """
        self._check_not_frozen()
        self._named(update_running_moments, input, self.count, self.mean, self.m2, group=self._group(), site=self)

    def merge(self, *others: "RunningNorm | Moments") -> None:
        """Merge what others have collected on this rank and on the other ranks, in one exchange.

        Their samples must be new to this one: a worker that started from a copy calls :meth:`reset` first. Over ranks,
        every rank must call this, if need be with nothing.

        Args:
            *others: Modules of the same shape, or their :attr:`moments`.

        Raises:
            ValueError: If shapes differ.
            SyncNormError: If frozen.
        """
        self._check_not_frozen()
        device, none = self.mean.device, torch.zeros(self.mean.numel(), dtype=torch.float64, device=self.mean.device)
        parts = [Moments(0.0, none, none)]
        for other in others:
            part = other.moments if isinstance(other, RunningNorm) else other
            shape = other.shape if isinstance(other, RunningNorm) else tuple(part.mean.shape)
            if part.mean.numel() != self.mean.numel() or (isinstance(other, RunningNorm) and shape != self.shape):
                raise ValueError(f"RunningNorm{self.shape} can merge moments of its own shape only, got {shape}.")
            count = torch.as_tensor(part.count, dtype=torch.float64, device=device)
            parts.append(Moments(count, part.mean.to(none).flatten(), part.m2.to(none).flatten()))
        local = merge_moments(stack_moments(parts))
        self._named(merge_running_moments, local, self.count, self.mean, self.m2, group=self._group(), site=self)

    def normalize(self, input: Tensor) -> Tensor:
        """Normalise ``input`` by the moments as they are, clip included."""
        return self._named(standardize, input, self.mean, self.std, self.clip)

    def denormalize(self, input: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, for what was not clipped."""
        return self._named(destandardize, input, self.mean, self.std)

    def freeze(self) -> Self:
        """Hold the moments fixed, in training too, until :meth:`unfreeze`."""
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Let the moments move again."""
        self.frozen = False
        return self

    def reset(self) -> Self:
        """Forget all samples."""
        for buffer in (self.count, self.mean, self.m2):
            buffer.zero_()
        return self

    def reset_parameters(self) -> None:
        """As :meth:`reset`, by the name under which others look for it."""
        self.reset()

    def extra_repr(self) -> str:
        """The settings."""
        frozen = ", frozen" if self.frozen else ""
        return f"{', '.join(map(str, self.shape))}, eps={self.eps:g}, clip={self.clip}{frozen}"

    def _check_not_frozen(self) -> None:
        if self.frozen:
            raise SyncNormError("RunningNorm is frozen, so it cannot take new samples. Call unfreeze() first.")


def feature_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of a sample from a number of features or a shape."""
    out = (shape,) if isinstance(shape, int) else tuple(shape)
    if not out or not all(isinstance(n, int) and n > 0 for n in out):
        raise ValueError(f"expected a number of features, or the shape of a sample, all positive; got {shape!r}.")
    return out
