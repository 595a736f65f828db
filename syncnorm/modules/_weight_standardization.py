"""Weight standardisation as convolutions of its own, and as a parametrization of a layer that exists."""

from typing import Any, TypeVar

from torch import Tensor, nn

from syncnorm.functional._weight_standardization import weight_standardization as standardize
from syncnorm.modules._filters import FilterConv, parametrize_filters

__all__ = [
    "WeightStandardizedConv1d",
    "WeightStandardizedConv2d",
    "WeightStandardizedConv3d",
    "weight_standardization",
]

_Layer = TypeVar("_Layer", bound=nn.Module)

_DOC = """A ``nn.Conv{dims}d`` whose filters are standardised before use.

    Usually followed by :class:`syncnorm.GroupNorm`, which together reaches batch norm without a batch. The state dict is
    that of the plain convolution and holds the weight as it was learned; a checkpoint loads either way, but means another
    function. See :func:`syncnorm.functional.weight_standardization`; for layers that exist, :func:`weight_standardization`.

    Args:
        *args: As ``nn.Conv{dims}d``.
        eps: Added to the variance of a filter.
        **kwargs: As ``nn.Conv{dims}d``.

    Raises:
        ValueError: If a filter has one value only, which would become 0.

    Reference: Qiao, Wang, Liu, Shen & Yuille (2019), section 3.
    """


class _StandardizedConv(FilterConv):
    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = _checked(eps)
        standardize(self.weight.detach().to("meta"), eps)  # better refused now than at the first forward

    def filters(self, weight: Tensor) -> Tensor:
        return standardize(weight, self.eps)

    def extra_repr(self) -> str:
        convolution: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{convolution}, eps={self.eps}"


class WeightStandardizedConv1d(_StandardizedConv, nn.Conv1d):
    __doc__ = _DOC.format(dims=1)


class WeightStandardizedConv2d(_StandardizedConv, nn.Conv2d):
    __doc__ = _DOC.format(dims=2)


class WeightStandardizedConv3d(_StandardizedConv, nn.Conv3d):
    __doc__ = _DOC.format(dims=3)


def weight_standardization(module: _Layer, name: str = "weight", eps: float = 1e-5) -> _Layer:
    """Standardise the weight of a convolution or linear layer from now on, as a parametrization.

    The learned weight stays the same parameter, under ``parametrizations.weight.original``;
    ``torch.nn.utils.parametrize.remove_parametrizations`` takes it off again.

    Args:
        module: ``nn.Conv1d/2d/3d`` or ``nn.Linear``; changed in place.
        name: Of its weight.
        eps: Added to the variance of a filter.

    Returns:
        The same module.

    Raises:
        TypeError: For another kind of module, such as a transposed convolution, whose first dim is not its filters.
        ValueError: If it has no such weight, or filters of one value only.

    Example:
        >>> conv = weight_standardization(nn.Conv2d(3, 8, 3))
        >>> bool(conv.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True

    Reference: Qiao, Wang, Liu, Shen & Yuille (2019), section 3.
    """
    function = _Standardization(_checked(eps))
    return parametrize_filters(module, name, function, "weight_standardization", "standardise")


class _Standardization(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        return standardize(weight, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _checked(eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"weight standardization: eps must be positive, got {eps}. A constant filter has no variance.")
    return eps
