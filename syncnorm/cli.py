"""The command line: ``python -m syncnorm fit`` and its kin are Lightning's CLI, with handwritten digits as the default.

Lightning is imported only by a command that needs it, so ``--help`` and ``--version`` answer at once.
"""

import argparse
import sys
from collections.abc import Sequence

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
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default. With more than one process leave it None:
            the other processes are started with ``sys.argv``.

    Returns:
        The exit status: 0, or 1 if a build failed. Wrong usage ends in ``SystemExit(2)``.
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
    chosen = parser.parse_args(arguments)
    return _build(force=chosen.force, verbose=chosen.verbose) if chosen.command == "build" else 2


def _build(*, force: bool, verbose: bool) -> int:
    from syncnorm.errors import SyncNormError
    from syncnorm.kernels import native

    try:
        print("building the native operators (half a minute the first time) ...", file=sys.stderr, flush=True)
        print(native.build(force=force, verbose=verbose))
    except SyncNormError as error:
        print(f"syncnorm build: {error}", file=sys.stderr)
        return 1
    return 0
