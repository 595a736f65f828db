"""Lightning's CLI with the digits as its defaults, and without its trust in files."""

import inspect
import sys
import traceback
from argparse import ArgumentError
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncnorm.errors import SyncNormError
from syncnorm.lightning._config import MODE
from syncnorm.lightning._flavours import flavour

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    LightningCLI = import_module(f"{flavour()}.cli").LightningCLI

__all__ = ["run"]


def run(arguments: list[str] | None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; arguments from ``sys.argv`` where None.

    Raises:
        SystemExit: With 2 and one line, if the arguments or a configuration cannot be.
    """
    try:
        _DigitsCLI(  # any model and any data, or none, by class path
            parser_kwargs={"prog": "syncnorm", "parser_mode": MODE, "exit_on_error": False},
            save_config_kwargs={"overwrite": True},  # a run without a logger has no folder of its own to keep it in
            args=arguments,
        )
    except ArgumentError as error:
        command = (sys.argv[1:] if arguments is None else arguments)[0]
        print(
            f"syncnorm {command}: {' '.join(str(error).split())} (syncnorm {command} --help tells more)",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


class _DigitsCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: "LightningArgumentParser") -> None:
        parser.set_defaults(
            {
                "model": {"class_path": "syncnorm.lightning.DigitsMLP"},
                "data": {"class_path": "syncnorm.lightning.DigitsDataModule"},
            }
        )

    def instantiate_classes(self) -> None:
        """Lightning's; what a class of ours does not take is bad input, and what other classes raise is theirs."""
        try:
            super().instantiate_classes()
        except Exception as error:
            first: BaseException = error
            while said := first.__cause__ or first.__context__:
                first = said  # jsonargparse wraps it, and tells of all that it expected
            if isinstance(first, ValueError | TypeError) and _is_ours(first):
                raise ArgumentError(None, str(first)) from error
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the option to load a checkpoint as a pickle, which may run code."""
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        given: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        path = str(given.get("ckpt_path") or "")
        if path and not _is_known(path) and not Path(path).exists():
            raise ArgumentError(None, f"there is no checkpoint {path}.")
        if "weights_only" in inspect.signature(getattr(self.trainer, subcommand)).parameters:
            return {**given, "weights_only": True}
        if given.get("ckpt_path"):
            raise SyncNormError(
                "this Lightning loads checkpoints as pickles, which may run code, and has no way to ask for less. "
                "Install lightning>=2.6."
            )
        return given


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("syncnorm.")


def _is_known(ckpt_path: str) -> bool:
    """Whether it is one of Lightning's words for a checkpoint, or an address, and no file of this machine."""
    return ckpt_path in ("best", "last", "hpc") or ckpt_path.startswith("registry") or "://" in ckpt_path
