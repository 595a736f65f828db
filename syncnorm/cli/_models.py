"""The commands that look at a model: ``inspect``, ``verify``, ``doctor``."""

from typing import TYPE_CHECKING

from syncnorm.cli._arguments import Count, Shape, Target
from syncnorm.cli._console import working
from syncnorm.conversion import To
from syncnorm.conversion._table import Report

if TYPE_CHECKING:
    from syncnorm.diagnostics import Subject

__all__ = ["doctor", "inspect", "verify"]


def inspect(target: Target) -> Report:
    """List the norms of a model and what deserves a second look.

    Runs nothing and changes nothing; the same as print(syncnorm.inspect(model)).

    Args:
        target: The model: a function without arguments that returns it, for example my_project.models:build.
    """
    from syncnorm.diagnostics import inspect

    return inspect(_load(target).model)


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
            f"{target} makes a {type(subject.model).__name__} without any normalisation layer. Name a model that has one; if "
            "it makes its layers late, call what makes them in the factory."
        )
    return subject
