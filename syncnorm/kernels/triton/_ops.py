"""The primitives as functions, and as operators ``torch.ops.syncnorm_triton``, into which torch.compile and export see.

Eager calls use the functions: a Python operator costs 100 µs a call.
"""

from collections.abc import Callable
from typing import Any

from torch.library import custom_op, triton_op
from triton import JITFunction

from syncnorm.kernels.triton._batch import backward_input, backward_reduce, moments, normalize
from syncnorm.kernels.triton._batch_kernels import sum_kernel
from syncnorm.kernels.triton._rows import group_backward, group_forward, row_backward, row_forward

__all__ = [
    "backward_input",
    "backward_reduce",
    "group_backward",
    "group_forward",
    "moments",
    "normalize",
    "row_backward",
    "row_forward",
]


def _register(function: Callable[..., Any]) -> None:
    name = f"syncnorm_triton::{function.__name__}"
    if isinstance(sum_kernel, JITFunction):
        triton_op(name, function, mutates_args=())  # to fake tensors it does what it does to others, less the kernels
    else:  # the interpreter's kernels are Python and cannot be traced
        custom_op(name, function, mutates_args=()).register_fake(function)


for _function in (
    moments, normalize, backward_reduce, backward_input, row_forward, row_backward, group_forward, group_backward
):  # fmt: skip
    _register(_function)
