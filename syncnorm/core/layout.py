"""Two dense shapes stand for every layout: ``[N, C, S]`` (channels first) and ``[M, C]`` (channels innermost).

An input of any rank becomes one of them by a view, so each kernel is written for two loops and not for ten; only an
input that is neither is copied. The form tells the layout: whoever has the flat input can lay a gradient out alike.
"""

# N batch, C channels, S flattened space, M = N·S

import torch
from torch import Tensor

__all__ = ["accumulate_dtype", "channel_view", "count_per_channel", "flatten", "flatten_like", "unflatten"]


def flatten(x: Tensor) -> Tensor:
    """View ``x`` [N, C, *] as [N, C, S], or as [M, C] if its channels are innermost; copies only a layout that is neither."""
    if x.dim() == 2:
        return x.contiguous()
    flat = x.flatten(2) if x.is_contiguous() else None
    if flat is not None and flat.size(2) > 1:
        return flat
    channels_inner = x.movedim(1, -1)
    if channels_inner.is_contiguous():
        return channels_inner.reshape(-1, x.size(1))
    return x.contiguous().flatten(2)


def flatten_like(x: Tensor, flat: Tensor) -> Tensor:
    """Bring ``x`` [N, C, *] into the form of ``flat``, whatever its own layout (a gradient need not have its input's)."""
    if flat.dim() == 2:
        return x.movedim(1, -1).reshape(-1, x.size(1)).contiguous()
    return x.contiguous().flatten(2)


def unflatten(flat: Tensor, shape: torch.Size) -> Tensor:
    """Give a flat tensor its shape [N, C, *] back. A view: channels that were innermost stay so."""
    if flat.dim() == 2 and len(shape) > 2:
        return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return flat.view(shape)


def channel_view(vector: Tensor, flat: Tensor) -> Tensor:
    """View a ``[C]`` vector so that it broadcasts over ``flat``."""
    return vector.unsqueeze(-1) if flat.dim() == 3 else vector


def count_per_channel(x: Tensor) -> int:
    """Values per channel in ``x`` [N, C, *] or in its flat form."""
    return x.numel() // x.size(1) if x.size(1) else 0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over ``dtype`` are held in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
