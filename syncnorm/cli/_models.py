"""The commands that look at a model: ``inspect``, ``verify``, ``advise``, ``doctor``."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from syncnorm.cli._arguments import Count, Shape, Target
from syncnorm.cli._console import working
from syncnorm.conversion import To
from syncnorm.conversion._table import Report

if TYPE_CHECKING:
    from syncnorm.diagnostics import Subject

__all__ = ["advise", "doctor", "inspect", "verify"]


def inspect(target: Target, *, to: To | None = None) -> Report:
    """List the norms of a model and what deserves a second look.

    Runs nothing and changes nothing; the same as print(syncnorm.inspect(model)), with --to as print(syncnorm.plan(model, to)).

    Args:
        target: The model: a function without arguments that returns it, for example my_project.models:build.
        to: Say instead what syncnorm.convert would make of which layer, and why.
    """
    from syncnorm.conversion import plan
    from syncnorm.diagnostics import inspect

    model = _load(target).model
    return inspect(model) if to is None else plan(model, to)


def verify(target: Target, *, shape: Shape = (), ranks: Count = 2, to: To = "sync_batch_norm") -> Report:
    """Prove that the converted model on several ranks equals one process.

    One training step in float64, of the model as it is in one process on the whole batch, and of the converted one on
    processes of this machine with uneven shards: outputs, gradients, buffers and every layer are compared.

    Args:
        target: The model, or the model and an input: a function without arguments that returns them.
        shape: Of a random input, the whole batch; in place of the factory's.
        ranks: Number of processes.
        to: What to convert to.
    """
    from syncnorm.diagnostics import verify
    from syncnorm.testing import RankError

    subject = _load(target, shape)
    if subject.input is None:
        raise ValueError("verify needs an input: let the factory return (model, input), or give --shape.")
    try:
        with working(f"one step in one process and on {ranks} ranks"):
            return verify(subject.model, subject.input, ranks, to=to)
    except RankError as error:
        raise ValueError(f"the model fails: {str(error).strip().splitlines()[-1]}") from error


def advise(
    target: Target,
    *,
    shape: Shape = (),
    ranks: Count = 1,
    ranks_per_node: Count | None = None,
    num_batches: Count = 32,
) -> Report:
    """Say for each batch norm whether it has enough samples behind it, and what to do if not.

    Measured on the batches that the factory gives: how noisy their means are, so how many independent values they stand for.
    Ends with 1 if something is to be done; docs/choosing.md has the rules.

    Args:
        target: The model and batches of one rank, as large as in training: a function without arguments that returns
            (model, loader), where the loader is a DataLoader, a list or any iterable. A tensor is one batch.
        shape: Of random batches, in place of the factory's. They tell of sizes, not of your data.
        ranks: How many will train together.
        ranks_per_node: How many of them on one machine; by default all.
        num_batches: Batches to measure, at most.
    """
    import torch

    from syncnorm.diagnostics import advise

    subject = _load(target)
    batches: Any = subject.input if not shape else (torch.randn(shape) for _ in range(num_batches))
    if batches is None:
        raise ValueError("advise needs batches: let the factory return (model, loader), or give --shape.")
    if isinstance(batches, torch.Tensor | tuple):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"advise needs batches that can be iterated, such as a DataLoader, got {type(batches).__name__}."
        )
    with working(f"measuring {num_batches} batches"):
        return advise(subject.model, batches, num_batches, ranks=ranks, ranks_per_node=ranks_per_node)


def doctor(
    target: Target | None = None,
    *,
    shape: Shape = (),
    ranks: Count | None = None,
    no_trial: bool = False,
    timeout: float = 60.0,
) -> Report:
    """Examine this installation and a model: versions, a trial, known faults.

    Args:
        target: The model, with an input and a Trainer if it likes: a function without arguments that returns them. Without
            it the installation alone is examined.
        shape: Of a random input, one rank's batch; in place of the factory's.
        ranks: How many ranks will run the model; by default what the Trainer says.
        no_trial: Leave out the self-test on two ranks.
        timeout: Seconds for each part of the self-test.
    """
    from syncnorm.diagnostics import doctor

    subject = _load(target, shape, ranks) if target else None
    with working("examining"):
        return doctor(subject, trials=not no_trial, timeout=timeout)


def _load(target: str, shape: tuple[int, ...] = (), ranks: int | None = None) -> "Subject":
    from syncnorm.conversion._validate import is_norm
    from syncnorm.diagnostics._target import load_subject

    subject = load_subject(target, shape, ranks)
    if not any(is_norm(module) for module in subject.model.modules()):
        raise ValueError(
            f"{target} makes a {type(subject.model).__name__} without a normalisation layer of torch or syncnorm. Name a model "
            "that has one; if it makes its layers late, call what makes them in the factory."
        )
    return subject
