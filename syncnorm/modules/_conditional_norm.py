"""A wrapper that lets a condition choose the affine map of any norm."""

from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.functional._conditional_norm import conditional_affine
from syncnorm.modules._mixed_statistics import MixedStatistics
from syncnorm.modules._statistics import SyncStatistics

__all__ = ["ConditionalNorm"]


class ConditionalNorm(nn.Module):
    """A norm whose scale and shift per channel are predicted from a condition: ``y = norm(x)·(1 + Δγ(z)) + β(z)``.

    With a class index as z and a batch norm this is conditional batch norm, with a vector and any norm FiLM, with an
    instance norm adaptive instance norm from a condition. Δγ and β are linear in z and start at zero, so that the layer
    begins as the plain norm.

    Weight and bias of the norm itself, if it has them, stay and act first. They are of no use beside a condition vector,
    whose projection has a bias: give a norm with ``affine=False``.

    Args:
        norm: Any norm, ``[N, C, *]`` or with features last. Statistics of a synchronised one stay those of all samples,
            whatever their conditions.
        cond_dim: Width D of a condition vector. Either this or ``num_classes``.
        num_classes: Number of classes K, where the condition is a class index.
        num_features: C; taken from ``norm`` if that says it.
        channel_dim: Where the channels are; taken from ``norm`` by default: last for LayerNorm and RMSNorm, else 1.
        device: Of the projection; that of ``norm`` by default.
        dtype: Of the projection; that of ``norm`` by default.

    Shape:
        Input ``[N, C, *]`` (or ``[N, *, C]``) and a condition ``[N, D]``, or int64 ``[N]`` of class indices; output like
        the input.

    Attributes:
        norm: The wrapped norm.
        projection: ``nn.Linear(D, 2C)`` or ``nn.Embedding(K, 2C)``: Δγ, then β.

    Raises:
        ValueError: If the condition does not fit, by shape or as a class.
        TypeError: If a condition vector is not floating point, or class indices are not integers.

    Example:
        >>> layer = ConditionalNorm(nn.BatchNorm2d(8, affine=False), cond_dim=16)
        >>> layer(torch.randn(4, 8, 5, 5), torch.randn(4, 16)).shape
        torch.Size([4, 8, 5, 5])

    Reference: de Vries et al. (2017), arXiv:1707.00683, section 3.2 (conditional batch norm); Dumoulin et al. (2017),
    arXiv:1610.07629, equation 5 (one scale and shift per class); Perez et al. (2018), arXiv:1709.07871, equation 2 (FiLM).
    """

    def __init__(
        self,
        norm: nn.Module,
        cond_dim: int | None = None,
        *,
        num_classes: int | None = None,
        num_features: int | None = None,
        channel_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (cond_dim is None) == (num_classes is None):
            raise ValueError(
                "ConditionalNorm takes either cond_dim (the condition is a vector) or num_classes (it is a class index), "
                f"got cond_dim={cond_dim}, num_classes={num_classes}."
            )
        for name, value in (("cond_dim", cond_dim), ("num_classes", num_classes)):
            if value is not None and value < 1:
                raise ValueError(f"ConditionalNorm: {name} must be at least 1, got {value}.")
        features, channels_at = _shape_of(norm)
        if None not in (features, num_features) and features != num_features:
            raise ValueError(
                f"ConditionalNorm: {type(norm).__name__} has {features} channels, and num_features={num_features} was given."
            )
        num_features = features if num_features is None else num_features
        if num_features is None:
            raise ValueError(
                f"ConditionalNorm cannot tell how many channels {type(norm).__name__} has: pass num_features (and "
                "channel_dim, if they are not in dim 1)."
            )
        self.norm = norm
        self.cond_dim, self.num_classes, self.num_features = cond_dim, num_classes, num_features
        self.channel_dim = channels_at if channel_dim is None else channel_dim
        like = next((t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), None)
        options: dict[str, Any] = {
            "device": like.device if device is None and like is not None else device,
            "dtype": like.dtype if dtype is None and like is not None else dtype,
        }
        self.projection: nn.Linear | nn.Embedding
        if cond_dim is not None:
            self.projection = nn.Linear(cond_dim, 2 * num_features, **options)
        else:
            assert num_classes is not None
            self.projection = nn.Embedding(num_classes, 2 * num_features, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the projection to zero: the layer is the plain norm. The norm itself is left as it is."""
        for parameter in self.projection.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        """Normalise ``input`` and scale and shift it as ``condition`` says."""
        # Before the norm, which may meet other ranks and move running statistics.
        try:
            scale, shift = self._predict(input, condition).chunk(2, -1)
        except (ValueError, TypeError) as error:
            if isinstance(self.norm, SyncStatistics | MixedStatistics):
                self.norm._tell_others(input)
            raise type(error)(f"ConditionalNorm({type(self.norm).__name__}): {error}") from error
        return conditional_affine(self.norm(input), scale, shift, self.channel_dim)

    def _predict(self, input: Tensor, condition: Tensor) -> Tensor:
        n = input.size(0)
        if self.cond_dim is not None:
            if condition.shape != (n, self.cond_dim):
                raise ValueError(
                    f"expected a condition [N, cond_dim] = {[n, self.cond_dim]} for an input {list(input.shape)}, got "
                    f"{list(condition.shape)}."
                )
            if not condition.is_floating_point():
                raise TypeError(
                    f"expected a floating-point condition, got {condition.dtype}. For class indices, construct with "
                    "num_classes=."
                )
            predicted: Tensor = self.projection(condition.to(self.projection.weight.dtype))
            return predicted
        if condition.is_floating_point() or condition.is_complex() or condition.dtype == torch.bool:
            raise TypeError(
                f"expected class indices as integers, got {condition.dtype}. For one-hot rows, pass condition.argmax(1); for "
                "vectors, construct with cond_dim=."
            )
        if condition.shape != (n,):
            raise ValueError(
                f"expected one class index per sample, [N] = {[n]} for an input {list(input.shape)}, got "
                f"{list(condition.shape)}."
            )
        if condition.device.type == "cpu" and not torch.compiler.is_compiling() and n:
            low, high = (int(end) for end in condition.aminmax())
            if low < 0 or high >= (self.num_classes or 0):
                raise ValueError(
                    f"class indices must be in [0, {self.num_classes}), as num_classes says; got {low} to {high}."
                )
        looked_up: Tensor = self.projection(condition.long())
        return looked_up

    def extra_repr(self) -> str:
        """The condition, and where the channels are."""
        condition = f"num_classes={self.num_classes}" if self.cond_dim is None else f"cond_dim={self.cond_dim}"
        return condition if self.channel_dim == 1 else f"{condition}, channel_dim={self.channel_dim}"


def _shape_of(norm: nn.Module) -> tuple[int | None, int]:
    """How many channels a norm has, None if it does not say, and in which dim."""
    shape = getattr(norm, "normalized_shape", None)
    if shape is not None:
        return (shape[0] if len(shape) == 1 else None), int(getattr(norm, "channel_dim", -1))
    for name in ("num_features", "num_channels"):
        count = getattr(norm, name, None)
        if isinstance(count, int):
            return count, int(getattr(norm, "channel_dim", 1))
    return None, 1
