"""What a model can be converted to, which options each target takes, and what makes them wrong."""

import difflib
from typing import Any, Literal, get_args

from syncnorm.distributed import group_spec
from syncnorm.kernels import BACKENDS

__all__ = ["STATISTICS_FAMILIES", "TARGET_OPTIONS", "To", "check_options"]

To = Literal[
    "sync_batch_norm",
    "batch_renorm",
    "ghost_batch_norm",
    "frozen_batch_norm",
    "group_norm",
    "layer_norm",
    "instance_norm",
]

TARGET_OPTIONS: dict[str, tuple[str, ...]] = {
    "sync_batch_norm": ("process_group", "backend", "accumulate"),
    "batch_renorm": ("process_group", "backend", "r_max", "d_max"),
    "ghost_batch_norm": ("process_group", "backend", "virtual_batch_size"),
    "frozen_batch_norm": (),
    "group_norm": ("num_groups", "affine"),
    "layer_norm": ("affine",),
    "instance_norm": ("affine",),
}
assert set(TARGET_OPTIONS) == set(get_args(To))

STATISTICS_FAMILIES = ("sync_batch_norm", "batch_renorm", "ghost_batch_norm", "frozen_batch_norm")
"""Targets with batch norm's state-dict keys: a layer is the same object with another class."""


def check_options(to: str, options: dict[str, Any]) -> None:
    """See that ``to`` is a target and takes ``options``, by name and by value, before anything is changed.

    Raises:
        ValueError: For an unknown target or a value out of range.
        TypeError: For an option that the target does not take, or of the wrong type.
    """
    if to not in TARGET_OPTIONS:
        raise ValueError(f"to must be one of {list(TARGET_OPTIONS)}, got {to!r}.{_close(str(to), TARGET_OPTIONS)}")
    for name in options:
        if name not in TARGET_OPTIONS[to]:
            others = [target for target, taken in TARGET_OPTIONS.items() if name in taken]
            hint = f" It belongs to {' and '.join(others)}." if others else _close(name, TARGET_OPTIONS[to])
            raise TypeError(
                f"to={to!r} takes the options {list(TARGET_OPTIONS[to])}, got {name}={options[name]!r}.{hint}"
            )
    if "process_group" in options:
        group_spec(options["process_group"])
    backend = options.get("backend", "auto")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}.")
    if to == "ghost_batch_norm" and "virtual_batch_size" not in options:
        raise TypeError(
            "to='ghost_batch_norm' needs virtual_batch_size=n, the number of samples that share a statistic."
        )
    for name, least in (("r_max", 1), ("d_max", 0)):
        value = options.get(name, least)
        if not isinstance(value, (int, float)) or not value >= least:
            raise ValueError(f"{name} must be a number of at least {least}, got {value!r}.")
    counts = (("accumulate", "micro-batches"), ("num_groups", "groups"), ("virtual_batch_size", "samples"))
    for name, counted in counts:
        value = options.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a number of {counted}, at least 1; got {value!r}.")
    if options.get("affine") not in (None, True, False):
        raise TypeError(f"affine must be True, False or None (as each layer has it), got {options['affine']!r}.")


def _close(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
