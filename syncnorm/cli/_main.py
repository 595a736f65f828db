"""From arguments to a command, and from what it reports or raises to an exit status: 0 clean, 1 findings, 2 bad input."""

import argparse
import os
import sys
from collections.abc import Sequence

from syncnorm._version import __version__
from syncnorm.cli._arguments import add_command
from syncnorm.cli._bench import bench
from syncnorm.cli._build import build
from syncnorm.cli._checkpoint import convert_ckpt
from syncnorm.cli._console import reserved, show
from syncnorm.cli._demo import demo
from syncnorm.cli._models import advise, doctor, inspect, verify
from syncnorm.cli._plot import plot

__all__ = ["COMMANDS", "main"]

COMMANDS = (inspect, verify, advise, doctor, convert_ckpt, bench, demo, plot, build)
_LIGHTNING = {
    "fit": "train a model, with SyncNorm among its callbacks",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run a model over the prediction data",
}
_EPILOG = """\
Every command ends with 0 if all is well, 1 if something was found, 2 for bad input, which is told in one line and
changes nothing. --json prints JSON. What a model prints goes to standard error. Tables and colours are drawn on a terminal
where rich is installed and NO_COLOR is not set. COMMAND --help tells more.

inspect, verify, advise and doctor take a model as pkg.mod:factory, a function without arguments that returns the model, or
(model, input), or (model, input, trainer). For advise the input is a loader of batches.

  python -m syncnorm doctor my_project.models:build --shape 8,3,224,224 --ranks 4
  python -m syncnorm advise my_project.models:build_with_loader --ranks 8
  python -m syncnorm verify my_project.models:build --shape 8,3,224,224 --ranks 3 --json
  python -m syncnorm convert-ckpt last.ckpt group_norm.safetensors --to group_norm

fit, validate, test and predict are Lightning's CLI (https://lightning.ai/docs/pytorch/stable/cli/lightning_cli.html).
--model and --data take any LightningModule and LightningDataModule by class path; without them it is an MLP and
scikit-learn's handwritten digits. Say --data null for a model with loaders of its own.

  python -m syncnorm fit -c configs/demo.yaml -c configs/trainer/ddp_cpu.yaml -c configs/norm/sync.yaml
  python -m syncnorm fit --model my.Model --data my.Data --trainer.callbacks+=SyncNorm --trainer.devices 2
  python -m syncnorm fit --trainer.callbacks.help=SyncNorm
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default. For ``fit`` with more than one process
            leave it None: the other processes are started with ``sys.argv``.

    Returns:
        The exit status: 0, or 1 if something was found. Bad input ends in ``SystemExit(2)``.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in _LIGHTNING:
        from syncnorm.lightning._cli import run

        run(None if argv is None else arguments)
        return 0
    parser = make_parser()
    chosen = vars(parser.parse_args(arguments))
    name, command, as_json = (chosen.pop(key) for key in ("command", "run", "json"))
    from syncnorm.errors import SyncNormError

    try:
        with reserved():
            report = command(**{key: value for key, value in chosen.items() if value is not None})
    except (ValueError, TypeError, OSError, ImportError, SyncNormError) as error:
        parser.exit(2, f"syncnorm {name}: {_one_line(error)}\n")
    except KeyboardInterrupt:
        return 130  # as a shell has it
    try:
        return show(report, as_json=as_json)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still holds, and writes when it ends
        if isinstance(error, BrokenPipeError):  # `head` has read enough
            return 141  # as a shell has it
        parser.exit(2, f"syncnorm {name}: {_one_line(error)}\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands but Lightning's, of which it knows the names."""
    parser = argparse.ArgumentParser(
        prog="syncnorm",
        description="Normalisation layers that mean the same thing on one device and on many.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"syncnorm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        add_command(commands, command)
    for name, what in _LIGHTNING.items():
        commands.add_parser(name, help=what)
    return parser


def _one_line(error: Exception) -> str:
    """The first line of what an error says, and the next where that one only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
