"""What the norms of weights share: convolutions by a function of their filters, and that function as a parametrization."""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

__all__ = ["FilterConv", "parametrize_filters"]

_Layer = TypeVar("_Layer", bound=nn.Module)


class FilterConv(_ConvNd):
    """Base of convolutions by a function of their weight. Subclasses come before a convolution of torch."""

    def filters(self, weight: Tensor) -> Tensor:
        """What the convolution uses in place of ``weight``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.filters(self.weight), self.bias)


def parametrize_filters(module: _Layer, name: str, function: nn.Module, method: str, done: str) -> _Layer:
    """Register ``function`` as the parametrization of a weight ``[out, *]``.

    Args:
        module: ``nn.Conv1d/2d/3d`` or ``nn.Linear``; changed in place.
        name: Of its weight.
        function: Of a weight, without parameters; refuses what it cannot take.
        method: Name of the public function, for messages.
        done: What is done to a weight, for messages.

    Returns:
        The same module.

    Raises:
        TypeError: For another kind of module.
        ValueError: If it has no such weight.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        raise TypeError(
            f"{method} takes a Conv1d, Conv2d, Conv3d or Linear, whose weight is [out, *]; got {type(module).__name__}. For "
            "a model, apply it to each such layer in model.modules()."
        )
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{method}: {type(module).__name__} has no tensor {name!r} to {done}.")
    function(weight.detach().to("meta"))  # better refused now than at the first forward
    parametrize.register_parametrization(module, name, function)
    return module
