"""Moving average batch norm layers over all ranks, with the state of torch's batch norm."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.core.moving_average import MovingAverages, empty_window
from syncnorm.distributed.groups import LOCAL
from syncnorm.errors import SyncNormError
from syncnorm.functional._moving_average_batch_norm import moving_average_batch_norm
from syncnorm.modules._statistics import SyncStatistics

__all__ = ["MovingAverageBatchNorm1d", "MovingAverageBatchNorm2d", "MovingAverageBatchNorm3d"]


class _MovingAverageBatchNorm(SyncStatistics):
    """Batch norm for batches of one to four samples: it normalises, and takes its gradient, by the last ``window`` batches.

    The input is divided by the root of its mean square over the last batches of all ranks, and not centred: it belongs
    behind a convolution or linear layer with centred weights (:func:`syncnorm.modules.weight_centralization`), whose bias it
    makes superfluous. The gradient too uses an average over the last batches where batch norm uses its batch alone, so it
    is not the derivative of the output, and has none itself. Evaluation is batch norm's, and folds into a convolution.

    **State.** The keys are those of ``nn.BatchNorm*``. ``running_mean`` is a constant that is subtracted and that no batch
    moves: 0 in a new layer, which is the paper. ``running_var`` is the running mean square about it. Loaded into batch norm,
    such a checkpoint evaluates alike. A batch norm checkpoint loaded here evaluates alike, too, and goes on training about
    its running mean as it was; it counts as warmed up. Centring the weights in front of it changes its input, and calls for
    ``reset_running_stats()``. The windows are in no checkpoint (``torch.save`` of the layer, copies and pickles have them):
    in the first ``window`` steps after a restart from one, averages are over the batches since then. The output hardly
    notices, as r takes it to what evaluation gives; the gradient is as noisy as batch norm's at first.

    Every forward in training mode is one batch of the window, and every backward through one another: micro-batches count
    singly. Gradients in the window are in the units of the loss, so a loss scaler that changes its scale mixes units for
    ``window`` steps; prefer bfloat16, or a constant scale. DDP broadcasts the windows with the other buffers;
    ``broadcast_buffers=False`` saves that, as all ranks compute the same.

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the mean square.
        momentum: Weight of the new batch in the running mean square; None for the cumulative average.
        affine: Learn a weight and a bias per channel.
        process_group: Which ranks share statistics, as in :class:`syncnorm.SyncBatchNorm`.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        window: m, the batches that are averaged over. The paper's 16 are for batches of two samples.
        warmup: Batches after which the output is pulled towards what evaluation gives, by ``num_batches_tracked``.
        r_max: Largest factor by which it is pulled, at least 1 (1 is not at all).
        bias: With ``affine``, whether to learn the bias too.
        backend: Kernel backend, as in :class:`syncnorm.SyncBatchNorm`.

    Shape:
        Input ``[N, C, *]``; output the same. A single value per channel is enough.

    Raises:
        ValueError: If an input or an option does not fit.
        TypeError: If an input is not floating point.
        SyncNormError: As :class:`syncnorm.SyncBatchNorm`; if running statistics are taken away while training; or if a
            gradient is differentiated.

    Reference: Yan, Wan, Zhang, Zhang, Wei & Sun (2020), arXiv:2001.06838, section 4.
    """

    family = "moving_average_batch_norm"
    warmup: int
    r_max: float
    _squares: Tensor
    _slopes: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        process_group: object = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        window: int = 16,
        warmup: int = 100,
        r_max: float = 5.0,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, True, process_group, device, dtype, bias=bias, backend=backend
        )
        self._arrive(window, warmup, r_max)

    def _arrive(self, window: int = 16, warmup: int = 100, r_max: float = 5.0) -> None:
        self._set_limits(warmup, r_max)
        device = None if self.running_var is None else self.running_var.device
        size = _checked("window", window, 1)
        for name in ("_squares", "_slopes"):
            self.register_buffer(name, empty_window(size, self.num_features, device), persistent=False)

    def _change(self, window: int | None = None, warmup: int | None = None, r_max: float | None = None) -> None:
        self._set_limits(self.warmup if warmup is None else warmup, self.r_max if r_max is None else r_max)
        if window is not None and window != self.window:
            self._arrive(window, self.warmup, self.r_max)

    def _set_limits(self, warmup: int, r_max: float) -> None:
        if not r_max >= 1:
            raise ValueError(f"r_max must be at least 1 (1 is no correction), got {r_max}.")
        self.warmup, self.r_max = _checked("warmup", warmup, 0), float(r_max)

    def _leave(self) -> None:
        self._drop_buffers("_squares", "_slopes")
        del self.warmup, self.r_max

    @property
    def window(self) -> int:
        """Batches that are averaged over."""
        return self._squares.size(0)

    def settings(self) -> dict[str, Any]:
        """What :meth:`adopt` needs to make a layer like this one."""
        own = {"window": self.window, "warmup": self.warmup, "r_max": self.r_max}
        return {**super().settings(), **own}

    def reset_running_stats(self) -> None:
        """As torch's; the windows are emptied, too."""
        super().reset_running_stats()
        if "_squares" in self._buffers:  # not yet within the constructor
            self.empty_windows()

    def empty_windows(self) -> None:
        """Forget the last batches, so that the next one is normalised by itself; running statistics stay."""
        self._squares.zero_()
        self._slopes.zero_()

    def _normalize(self, input: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            raise SyncNormError(
                "moving average batch norm evaluates by running statistics, and they have been removed."
            )
        return moving_average_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            MovingAverages(self._squares, self._slopes, self.warmup, self.r_max),
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked,
            track=self.track_running_stats,
            group=self._group() if self.training else LOCAL,
            backend=self.backend,
            input_dims=self.input_dims,
            site=None if torch.compiler.is_compiling() else self,
        )

    def extra_repr(self) -> str:
        """The fields of the base, and those of the moving averages."""
        return f"{super().extra_repr()}, window={self.window}, warmup={self.warmup}, r_max={self.r_max:g}"


class MovingAverageBatchNorm1d(_MovingAverageBatchNorm, nn.BatchNorm1d):
    __doc__ = _MovingAverageBatchNorm.__doc__
    reverts_to = nn.BatchNorm1d
    input_dims = (2, 3)


class MovingAverageBatchNorm2d(_MovingAverageBatchNorm, nn.BatchNorm2d):
    __doc__ = _MovingAverageBatchNorm.__doc__
    reverts_to = nn.BatchNorm2d
    input_dims = (4,)


class MovingAverageBatchNorm3d(_MovingAverageBatchNorm, nn.BatchNorm3d):
    __doc__ = _MovingAverageBatchNorm.__doc__
    reverts_to = nn.BatchNorm3d
    input_dims = (5,)


def _checked(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a number of batches, at least {least}; got {value!r}.")
    return value
