"""Each primitive in GB/s, counting every tensor once, as a fraction of the copy bandwidth measured at the same size."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from gpu_parts.timing import copy_seconds, medians, random

from syncnorm.core.activation import Activation
from syncnorm.core.layout import flatten
from syncnorm.kernels import triton as kernels
from syncnorm.kernels.triton import rows as row_kernels

SHAPES = [(64, 256, 56, 56), (16, 64, 224, 224), (32, 2048, 7, 7)]
ROWS = [(32768, 1024), (16384, 4096), (8192, 8192), (4096, 16384)]
DRY = [(2, 8, 4, 4)]


def run(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Rows: primitive, shape, layout, dtype, µs, GB/s and the fraction of a copy's."""
    dtypes = [torch.float32] if dry else [torch.bfloat16, torch.float32]
    for shape in DRY if dry else SHAPES:
        for channels_last in (False, True):
            for dtype in dtypes:
                yield from batch(shape, channels_last, dtype, device)
    for m, d in [(4, 16)] if dry else ROWS:
        yield from rows(m, d, dtypes[0], device)


def batch(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str, only: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of the primitives of batch norm, or of those named."""
    x, g, r = (flatten(random(shape, dtype, device, channels_last)) for _ in range(3))
    C, relu = shape[1], Activation("relu")
    moments = kernels.batch_moments(x)
    mean, rstd = moments.mean, (moments.var + 1e-5).rsqrt()
    weight, bias = torch.rand(2, C, device=device)
    means = torch.rand(2, C, dtype=torch.float64, device=device)
    _, mask = kernels.batch_normalize(x, mean, rstd, weight, bias, relu, r)
    bits = 0.125 / x.element_size()
    cases: dict[str, tuple[float, Callable[[], object]]] = {  # passes over memory, in tensors
        "moments": (1, lambda: kernels.batch_moments(x)),
        "normalize": (2, lambda: kernels.batch_normalize(x, mean, rstd, weight, bias)),
        "normalize relu": (2, lambda: kernels.batch_normalize(x, mean, rstd, weight, bias, relu)),
        "normalize add relu": (3 + bits, lambda: kernels.batch_normalize(x, mean, rstd, weight, bias, relu, r)),
        "backward reduce": (2, lambda: kernels.batch_backward_reduce(g, x, mean, rstd)),
        "backward reduce relu": (2, lambda: kernels.batch_backward_reduce(g, x, mean, rstd, weight, bias, relu)),
        "backward input": (3, lambda: kernels.batch_backward_input(g, x, mean, rstd, weight, means)),
        "backward input relu": (3, lambda: kernels.batch_backward_input(g, x, mean, rstd, weight, means, bias, relu)),
        "backward input add relu": (
            4 + bits, lambda: kernels.batch_backward_input(g, x, mean, rstd, weight, means, bias, relu, mask, True)
        ),
    }  # fmt: skip
    cases = {name: case for name, case in cases.items() if name in (only or cases)}
    layout = "NHWC" if channels_last else "NCHW"
    yield from _measured(cases, x, device, {"shape": str(shape), "layout": layout})


def rows(m: int, d: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """Rows of the primitives of row norms."""
    x, g = (random((m, d), dtype, device) for _ in range(2))
    weight = torch.rand(d, device=device)
    cases: dict[str, tuple[float, Callable[[], object]]] = {}
    for name, centre in (("layer", True), ("rms", False)):
        _, _, mean, rstd = row_kernels.row_norm_forward(x, weight, None, 1e-5, centre)
        cases[f"{name} forward"] = 2, lambda c=centre: row_kernels.row_norm_forward(x, weight, None, 1e-5, c)
        cases[f"{name} add forward"] = 4, lambda c=centre: row_kernels.row_norm_forward(x, weight, None, 1e-5, c, g)
        cases[f"{name} backward"] = (
            3,
            lambda m=mean, r=rstd: row_kernels.row_norm_backward(g, x, weight, m, r, True, False),
        )
    yield from _measured(cases, x, device, {"shape": str((m, d)), "layout": "rows"})


def _measured(
    cases: dict[str, tuple[float, Callable[[], object]]], x: torch.Tensor, device: str, labels: dict[str, str]
) -> Iterator[dict[str, Any]]:
    size = x.numel() * x.element_size()
    copy = 2 * size / copy_seconds(x, device) / 1e9
    for name, seconds in medians({name: case for name, (_, case) in cases.items()}, device).items():
        speed = cases[name][0] * size / seconds / 1e9
        yield {
            "primitive": name, **labels, "dtype": str(x.dtype).removeprefix("torch."), "µs": round(seconds * 1e6, 1),
            "GB/s": round(speed), "copy GB/s": round(copy), "of copy": round(speed / copy, 3),
        }  # fmt: skip
