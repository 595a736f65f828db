"""The command line: ``python -m syncnorm fit`` and its kin are Lightning's CLI, with handwritten digits as the default.

Lightning is imported only by a command that needs it, so ``--help`` and ``--version`` answer at once.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from syncnorm._version import __version__

__all__ = ["main"]

_COMMANDS = {
    "fit": "train a model, with SyncNorm among its callbacks",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run a model over the prediction data",
}
_EPILOG = """\
The first four are Lightning's CLI (https://lightning.ai/docs/pytorch/stable/cli/lightning_cli.html). --model and --data
take any LightningModule and LightningDataModule by class path; without them it is an MLP and scikit-learn's handwritten
digits. Say --data null for a model with loaders of its own.

  python -m syncnorm fit -c configs/demo.yaml -c configs/trainer/ddp_cpu.yaml -c configs/norm/sync.yaml
  python -m syncnorm fit --model my.Model --data my.Data --trainer.callbacks+=SyncNorm --trainer.devices 2
  python -m syncnorm fit --trainer.callbacks.help=SyncNorm

doctor, inspect and verify take a model as pkg.mod:factory, a function without arguments that returns the model, or
(model, input), or (model, input, trainer). They end with 0 if all is well, 1 if not, 2 for wrong usage.

  python -m syncnorm doctor
  python -m syncnorm doctor my_project.models:build --shape 8,3,224,224 --ranks 4
  python -m syncnorm verify my_project.models:build --shape 8,3,224,224 --ranks 3 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default. With more than one process leave it None:
            the other processes are started with ``sys.argv``.

    Returns:
        The exit status: 0, or 1 if a build failed or something was found. Wrong usage ends in ``SystemExit(2)``.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in _COMMANDS:
        from syncnorm.lightning._cli import run

        run(None if argv is None else arguments)
        return 0
    parser = argparse.ArgumentParser(
        prog="syncnorm",
        description="Normalisation layers that mean the same thing on one device and on many.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"syncnorm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, what in _COMMANDS.items():
        commands.add_parser(name, help=what)
    build = commands.add_parser("build", help="compile the native CPU operators, once per torch version and processor")
    build.add_argument("--force", action="store_true", help="compile even if they are built already")
    build.add_argument("--verbose", action="store_true", help="show the compiler's command line")
    build.set_defaults(run=_build)
    doctor = commands.add_parser(
        "doctor", help="examine this installation and a model: versions, a trial, known faults"
    )
    doctor.add_argument(
        "target", nargs="?", metavar="pkg.mod:factory", help="the model; without it the installation alone"
    )
    doctor.add_argument("--ranks", type=_count, help="how many ranks will run the model")
    doctor.add_argument("--no-trial", action="store_true", help="leave out the self-test on two ranks")
    doctor.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for each part of the self-test (default: 60)"
    )
    doctor.set_defaults(run=_doctor)
    inspect = commands.add_parser("inspect", help="list the norms of a model and what deserves a second look")
    inspect.add_argument("target", metavar="pkg.mod:factory")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="prove that the converted model on several ranks equals one process")
    verify.add_argument("target", metavar="pkg.mod:factory")
    verify.add_argument("--ranks", type=_count, default=2, help="number of processes (default: 2)")
    verify.add_argument("--to", default="sync_batch_norm", help="as in syncnorm.convert (default: sync_batch_norm)")
    verify.set_defaults(run=_verify)
    for command in (doctor, verify):
        command.add_argument(
            "--shape",
            type=_shape,
            default=(),
            help="of a random input, such as 8,3,224,224: one rank's for doctor, the whole batch for verify",
        )
    for command in (doctor, inspect, verify):
        command.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    from syncnorm.errors import SyncNormError

    try:
        status: int = chosen.run(chosen)
    except (ValueError, TypeError, SyncNormError) as error:
        parser.exit(2, f"syncnorm {chosen.command}: {str(error).splitlines()[0]}\n")
    return status


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be sizes with commas between them, such as 8,3,224,224; got {text!r}")
    return tuple(int(size) for size in text.split(","))


def _doctor(chosen: argparse.Namespace) -> int:
    from syncnorm.diagnostics._doctor import doctor
    from syncnorm.diagnostics._target import load_subject

    subject = load_subject(chosen.target, chosen.shape, chosen.ranks) if chosen.target else None
    return _show(doctor(subject, trials=not chosen.no_trial, timeout=chosen.timeout), chosen)


def _inspect(chosen: argparse.Namespace) -> int:
    from syncnorm.diagnostics import inspect
    from syncnorm.diagnostics._target import load_subject

    return _show(inspect(load_subject(chosen.target).model), chosen)


def _verify(chosen: argparse.Namespace) -> int:
    from syncnorm.diagnostics import verify
    from syncnorm.diagnostics._target import load_subject
    from syncnorm.testing import RankError

    subject = load_subject(chosen.target, chosen.shape)
    if subject.input is None:
        raise ValueError("verify needs an input: let the factory return (model, input), or give --shape.")
    try:
        return _show(verify(subject.model, subject.input, chosen.ranks, to=chosen.to), chosen)
    except RankError as error:
        raise ValueError(f"the model fails: {str(error).strip().splitlines()[-1]}") from error


def _show(report: Any, chosen: argparse.Namespace) -> int:
    """Print a report; its exit status."""
    ok = bool(getattr(report, "ok", True))
    if chosen.json:
        found = json.dumps({"ok": ok, **dataclasses.asdict(report)}, default=str)
        print(json.dumps(json.loads(found, parse_constant=str), indent=2))  # JSON has no Infinity
    else:
        print(_painted(str(report)))
    return 0 if ok else 1


def _painted(text: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    text = re.sub(r"^  ok:", "\033[32m\\g<0>\033[0m", text, flags=re.MULTILINE)
    return re.sub(r"^  FAILED:|^  \d+\. [\w-]+:|DO NOT EQUAL", "\033[31m\\g<0>\033[0m", text, flags=re.MULTILINE)


def _build(chosen: argparse.Namespace) -> int:
    from syncnorm.errors import SyncNormError
    from syncnorm.kernels import native

    try:
        print("building the native operators (half a minute the first time) ...", file=sys.stderr, flush=True)
        print(native.build(force=chosen.force, verbose=chosen.verbose))
    except SyncNormError as error:
        print(f"syncnorm build: {error}", file=sys.stderr)
        return 1
    return 0
