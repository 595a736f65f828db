"""What the functions on single samples share: checks of their input, dtypes of statistics, and layouts kept."""

# N batch, C channels

from collections.abc import Sequence

from torch import Tensor

from syncnorm.core.layout import accumulate_dtype

__all__ = [
    "accumulate_dtype",
    "channels_are_inner",
    "check_channels",
    "check_floating",
    "over_dim",
    "same_dtype",
    "with_layout_of",
]


def check_floating(name: str, input: Tensor) -> None:
    """Raise TypeError unless ``input`` is floating point."""
    if not input.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point input, got {input.dtype}. Convert it, for example with input.float()."
        )


def check_channels(
    name: str, input: Tensor, num_channels: int | None = None, dims: Sequence[int] | None = None
) -> None:
    """Raise unless ``input`` is a floating-point [N, C, *] with that many channels (and one of those numbers of dims)."""
    if input.dim() < 2 or (dims is not None and input.dim() not in dims):
        wanted = "at least 2" if dims is None else " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected an input [N, C, *] of {wanted} dims, got {list(input.shape)}.")
    check_floating(name, input)
    if num_channels is not None and input.size(1) != num_channels:
        hint = " The channels seem to be last: use x.movedim(-1, 1)." if input.size(-1) == num_channels else ""
        raise ValueError(f"{name}: expected {num_channels} channels in dim 1, got an input {list(input.shape)}.{hint}")


def over_dim(vector: Tensor, input: Tensor, dim: int) -> Tensor:
    """View a ``[C]`` vector so that it broadcasts along ``dim`` of ``input``."""
    return vector.reshape([-1] + [1] * (input.dim() - 1 - dim % input.dim()))


def same_dtype(input: Tensor, *vectors: Tensor | None) -> bool:
    """Whether every vector has the dtype of ``input``."""
    return all(vector is None or vector.dtype == input.dtype for vector in vectors)


def with_layout_of(input: Tensor, output: Tensor) -> Tensor:
    """``output`` with its channels innermost in memory if, and only if, those of ``input`` [N, C, *] are."""
    if output.stride() == input.stride():
        return output
    if channels_are_inner(input):
        return output.movedim(1, -1).contiguous().movedim(-1, 1)
    return output.contiguous() if input.is_contiguous() else output


def channels_are_inner(input: Tensor) -> bool:
    """Whether ``input`` [N, C, *] is dense with its channels innermost: channels_last and its like of any rank."""
    return input.dim() > 2 and not input.is_contiguous() and input.movedim(1, -1).is_contiguous()
