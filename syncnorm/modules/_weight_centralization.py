"""Weight centralisation as convolutions of its own, and as a parametrization of a layer that exists."""

from typing import Any, TypeVar

from torch import Tensor, nn

from syncnorm.functional._weight_centralization import weight_centralization as centralize
from syncnorm.modules._filters import FilterConv, parametrize_filters

__all__ = [
    "WeightCentralizedConv1d",
    "WeightCentralizedConv2d",
    "WeightCentralizedConv3d",
    "weight_centralization",
]

_Layer = TypeVar("_Layer", bound=nn.Module)

_DOC = """A ``nn.Conv{dims}d`` whose filters have mean 0 in use.

    Goes before :class:`syncnorm.modules.MovingAverageBatchNorm{dims}d`, which does not centre; ``bias=False`` is enough there.
    The state dict is that of the plain convolution and holds the weight as it was learned; a checkpoint loads either way,
    but means another function. See :func:`syncnorm.functional.weight_centralization`; for layers that exist,
    :func:`weight_centralization`.

    Args:
        *args: As ``nn.Conv{dims}d``.
        **kwargs: As ``nn.Conv{dims}d``.

    Raises:
        ValueError: If a filter has one value only, which would become 0.

    Reference: Yan, Wan, Zhang, Zhang, Wei & Sun (2020), arXiv:2001.06838, section 4.
    """


class _CentralizedConv(FilterConv):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        centralize(self.weight.detach().to("meta"))  # better refused now than at the first forward

    def filters(self, weight: Tensor) -> Tensor:
        return centralize(weight)


class WeightCentralizedConv1d(_CentralizedConv, nn.Conv1d):
    __doc__ = _DOC.format(dims=1)


class WeightCentralizedConv2d(_CentralizedConv, nn.Conv2d):
    __doc__ = _DOC.format(dims=2)


class WeightCentralizedConv3d(_CentralizedConv, nn.Conv3d):
    __doc__ = _DOC.format(dims=3)


def weight_centralization(module: _Layer, name: str = "weight") -> _Layer:
    """Centre the weight of a convolution or linear layer from now on, as a parametrization.

    The learned weight stays the same parameter, under ``parametrizations.weight.original``;
    ``torch.nn.utils.parametrize.remove_parametrizations`` takes it off again.

    Args:
        module: ``nn.Conv1d/2d/3d`` or ``nn.Linear``; changed in place.
        name: Of its weight.

    Returns:
        The same module.

    Raises:
        TypeError: For another kind of module, such as a transposed convolution, whose first dim is not its filters.
        ValueError: If it has no such weight, or filters of one value only.

    Example:
        >>> conv = weight_centralization(nn.Conv2d(3, 8, 3))
        >>> bool(conv.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True

    Reference: Yan, Wan, Zhang, Zhang, Wei & Sun (2020), arXiv:2001.06838, section 4.
    """
    return parametrize_filters(module, name, _Centralization(), "weight_centralization", "centre")


class _Centralization(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return centralize(weight)
