"""Proof on the user's own model that several ranks equal one process, and which layer is to blame where they do not.

The oracle is the model as it was, torch's own layers, in one process on the whole batch. The ranks run the converted
model on their shards; the gradient of the same scalar is added up by hand, so that no data-parallel wrapper can hide
a fault.
"""

import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.conversion import Plan, plan
from syncnorm.conversion._layers import display
from syncnorm.conversion._plan import shorten
from syncnorm.diagnostics._measure import Job, Measured, is_random, measure
from syncnorm.diagnostics._trees import leaves, map_tensors
from syncnorm.diagnostics._verify_report import VerifyReport, VerifyRow, compare, forgive_rounding
from syncnorm.modules import is_synced
from syncnorm.testing import RankError, run_ranks

__all__ = ["VerifyReport", "VerifyRow", "verify"]

# Of the largest value of its kind. One step in float64 is off by 1e-16 times what the depth of the model makes of it.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}


def verify(
    make_model: nn.Module | Callable[[], nn.Module],
    input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    ranks: int = 2,
    *,
    to: str = "sync_batch_norm",
    splits: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    timeout: float = 120.0,
    **conversion: Any,
) -> VerifyReport:
    """Check that a model trained on several ranks equals the same model in one process on the whole batch.

    One training step of forward and backward, on this machine's CPU over gloo: outputs, input gradients, parameter
    gradients (summed over ranks), buffers on every rank, and the output of every layer are compared. Where they
    differ, the report names the first layer that does.

    In a script, call it below ``if __name__ == "__main__":``, as everything that starts processes.

    Args:
        make_model: The model, or a function without arguments that makes it. It is not changed. Best a function at
            the top of a module: it is sent to the ranks by name, and the weights through a file.
        input: A whole batch, N samples in dim 0: a tensor, a tuple of positional or a mapping of keyword arguments.
            Tensors whose dim 0 is not N are given to every rank as they are.
        ranks: Number of processes, at least 2.
        to: As in :func:`syncnorm.convert`. For a norm that does not use the batch, the reference is converted too.
        splits: Samples per rank, N in all, zeros allowed. By default uneven where N allows, for even ones hide faults.
        dtype: ``torch.float64`` or ``torch.float32``.
        tolerance: Largest error that counts as equal, relative to the largest value of the tensor (at least to a
            tenth of the largest of its kind). By default 1e-10 in float64 and 1e-3 in float32, and where that is not met,
            as much as a change of the last bits of parameters and input makes in one process, which is noted: for
            gradients that are zero but for rounding, and models that make much of it.
        timeout: Seconds for each run: of one process, of the ranks, and, where these differ, three more of one process.
        **conversion: ``include``, ``exclude``, ``process_group``, ``strict`` and options, as in
            :func:`syncnorm.convert`.

    Returns:
        A :class:`VerifyReport`, true if all is equal; ``print`` it. Dropout and the like are put in evaluation mode
        on both sides, which the report notes.

    Raises:
        ValueError: If the batch is smaller than ``ranks``, nothing would be converted, ``accumulate`` is more than 1,
            no output has the batch in dim 0, the model draws random numbers that cannot be switched off, or something
            cannot be sent to another process.
        TypeError: If ``make_model`` makes no module, or ``input`` has no tensor.
        RankError: If the model fails on some rank, with that rank's traceback.

    Example:
        >>> report = syncnorm.verify(make_resnet, torch.randn(8, 3, 32, 32), ranks=3)  # doctest: +SKIP
        >>> assert report, report  # doctest: +SKIP
    """
    model = _model(make_model)
    if dtype not in _TOLERANCES:
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}.")
    if not isinstance(ranks, int) or ranks < 2:
        raise ValueError(f"ranks must be at least 2, got {ranks!r}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = plan(model, to, **conversion)
    if not any(e.action in ("swap", "replace") or is_synced(e._layer.module) for e in made.entries):
        raise ValueError(f"convert would change no layer of this model, so there is nothing to verify.\n{made}")
    steps = made.options.get("accumulate") or max(getattr(e._layer.module, "accumulate", 1) for e in made.entries)
    if steps > 1:
        raise ValueError(
            f"verify makes one step, and accumulate={steps} moves running statistics once in {steps}. Verify without it."
        )
    batch = _batch(input)
    shards = _splits(batch, ranks, splits)

    with tempfile.TemporaryDirectory(prefix="syncnorm-verify-") as folder:
        _send(Path(folder), make_model, model, input)
        job = Job(folder, to, conversion, dtype, batch, (batch,), reference=True, outputs=())
        _check_sendable(job)
        reference: Measured = _run(1, job, timeout)[0]
        if reference.random:
            raise ValueError(
                f"two runs of the model on the same input differ in {reference.random}, so it draws random numbers, "
                "which cannot be compared. Set the rates of its random layers to 0, or put them in evaluation mode."
            )
        if not reference.outputs:
            raise ValueError(
                f"no floating-point output of the model has its {batch} samples in dim 0 to compare; "
                f"its outputs are {reference.shapes}. Verify the part of the model before the loss."
            )
        job = Job(folder, to, conversion, dtype, batch, shards, reference=False, outputs=tuple(reference.outputs))
        parts: list[Measured] = _run(ranks, job, timeout)
        limit = _TOLERANCES[dtype] if tolerance is None else tolerance
        rows = compare(reference, parts, limit)
        if tolerance is None and not all(row.ok for row in rows):
            job = replace(job, splits=(batch,), reference=True)
            nudged = [compare(reference, _run(1, replace(job, nudge=seed), timeout), limit) for seed in (1, 2, 3)]
            rows = forgive_rounding(rows, nudged)

    return VerifyReport(
        rows=tuple(rows),
        splits=shards,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=limit,
        notes=tuple(_notes(model, made, reference, rows)),
        blame={display(entry.name): f"{entry.source}, {entry.action}: {entry.reason}" for entry in made.entries},
    )


def _model(make_model: Any) -> nn.Module:
    model = make_model if isinstance(make_model, nn.Module) or not callable(make_model) else make_model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_model must be an nn.Module or a function that makes one, got {type(model).__name__}.")
    return model


def _batch(input: Any) -> int:
    sizes = [tensor.size(0) for _, tensor in leaves(input) if tensor.dim()]
    if not sizes:
        raise TypeError(f"input must hold a tensor with its samples in dim 0, got {type(input).__name__} without one.")
    return sizes[0]


def _splits(batch: int, ranks: int, splits: Sequence[int] | None) -> tuple[int, ...]:
    if splits is not None:
        shards = tuple(splits)
        if len(shards) != ranks or sum(shards) != batch or min(shards) < 0:
            raise ValueError(f"splits must be {ranks} numbers of samples, {batch} in all, got {list(shards)}.")
        return shards
    if batch < ranks:
        raise ValueError(
            f"the input has {batch} samples in dim 0, fewer than {ranks} ranks. Use a larger batch, fewer ranks, or "
            "say with splits=[...] which ranks get none."
        )
    even = [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]
    if batch % ranks == 0 and batch > ranks:
        even[0], even[-1] = even[0] + 1, even[-1] - 1
    return tuple(even)


def _send(folder: Path, make_model: Any, model: nn.Module, input: Any) -> None:
    """Put the model, its weights and the input where the ranks find them."""
    try:
        sent = pickle.dumps(make_model)
    except Exception:
        # A function that cannot be sent by name: what it made may be.
        try:
            sent = pickle.dumps(model)
        except Exception as error:
            raise ValueError(
                f"make_model cannot be sent to another process: {error}. Give a function that makes the model, and define it, "
                "and the model's class, at the top of a module; a lambda, a local function or a local class has no name to be "
                "found by."
            ) from error
    (folder / "model.pickle").write_bytes(sent)
    torch.save(dict(model.state_dict()), folder / "weights.pt")
    with (folder / "input.pickle").open("wb") as file:
        pickle.dump(map_tensors(lambda tensor: tensor.detach().cpu().clone(), input), file)


def _check_sendable(job: Job) -> None:
    try:
        pickle.dumps(job)
    except Exception as error:
        raise ValueError(
            f"an argument of the conversion cannot be sent to another process: {error}. Give include and exclude as "
            "globs, types, or functions at the top of a module."
        ) from error


def _run(ranks: int, job: Job, timeout: float) -> list[Any]:
    try:
        return run_ranks(measure, ranks, job, timeout=timeout)
    except RankError as error:
        text = str(error)
        if "Can't get attribute" in text or "ModuleNotFoundError" in text:
            raise ValueError(
                "the model cannot be found in another process: define make_model, and the model's class, at the top of "
                f"a module that can be imported.\n{text}"
            ) from error
        if "exit code 1)" in text:  # it died before it could say why, while it read the script that started it
            raise ValueError(
                "the processes of verify could not start; what stopped them is printed above. A script must call verify "
                'below `if __name__ == "__main__":`, and it must be a file, not piped into Python.'
            ) from error
        raise


def _notes(model: nn.Module, made: Plan, reference: Measured, rows: list[VerifyRow]) -> list[str]:
    notes = []
    rounding = [row.name for row in rows if row.rounding]
    if rounding:
        notes.append(
            f"nothing but rounding, as the last bits of parameters and input move them as much: {shorten(rounding)}"
        )
    switched = [display(name) for name, module in model.named_modules() if is_random(module)]
    if switched:
        notes.append(f"random layers put in evaluation mode: {shorten(switched)}")
    if not model.training:
        notes.append("the model came in evaluation mode and was put in training mode")
    left = [shape for name, shape in reference.shapes.items() if name not in reference.outputs]
    if left:
        notes.append(f"{len(left)} outputs without the batch in dim 0 were not compared")
    notes += [f"{display(e.name)} was left: {e.reason}" for e in made.entries if e.action == "skip"]
    return notes
