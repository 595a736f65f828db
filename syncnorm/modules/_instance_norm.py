"""Instance norm layers with the constructors and the state of torch's."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm.functional._instance_norm import instance_norm
from syncnorm.kernels.rows import check_row_backend

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]

_ARGUMENTS = """ see :func:`syncnorm.functional.instance_norm`.

    Does not depend on the batch; the same in training and evaluation unless ``track_running_stats``. At 1×1 maps the output
    is the bias, where torch raises. The number of channels is checked with and without ``affine``.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep the mean over samples of their statistics, and normalise by it in evaluation.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.

    Shape:
        Input ``{shape}`` or, a single sample, ``{single}``; output the same.

    Reference: Ulyanov, Vedaldi & Lempitsky (2016).
    """


class _Instance(_InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_row_backend(backend)
        if track_running_stats and not isinstance(momentum, float | int):
            raise ValueError(
                f"{type(self).__name__}: momentum must be a number to track running statistics, got {momentum!r}. Use "
                "for example momentum=0.1."
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.backend = backend

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Without metadata torch takes a checkpoint for one of its version 0.3 and raises on running statistics, before
        # hooks are asked; with it they are unexpected keys like any other.
        if not self.track_running_stats:
            local_metadata = {"version": self._version, **local_metadata}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, input: Tensor) -> Tensor:
        dims: int = self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        if input.dim() not in (dims, dims + 1):
            raise ValueError(
                f"{type(self).__name__}: expected an input of {dims + 1} dims, or of {dims} for a single sample, got "
                f"{list(input.shape)}."
            )
        x = input.unsqueeze(0) if input.dim() == dims else input
        if x.size(1) != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: expected {self.num_features} channels in dim {input.dim() - dims}, got an input "
                f"{list(input.shape)}."
            )
        y = instance_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_input_stats=self.training or not self.track_running_stats,
            momentum=self.momentum or 0.0,
            eps=self.eps,
            backend=self.backend,
        )
        return y.squeeze(0) if input.dim() == dims else y


class InstanceNorm1d(_Instance, nn.InstanceNorm1d):
    __doc__ = "Normalise each channel of each sequence over time;" + _ARGUMENTS.format(
        shape="[N, C, L]", single="[C, L]"
    )


class InstanceNorm2d(_Instance, nn.InstanceNorm2d):
    __doc__ = "Normalise each channel of each image over space;" + _ARGUMENTS.format(
        shape="[N, C, H, W]", single="[C, H, W]"
    )


class InstanceNorm3d(_Instance, nn.InstanceNorm3d):
    __doc__ = "Normalise each channel of each volume over space;" + _ARGUMENTS.format(
        shape="[N, C, D, H, W]", single="[C, D, H, W]"
    )
