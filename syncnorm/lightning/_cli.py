"""Lightning's CLI with the digits as its defaults."""

from importlib import import_module
from typing import TYPE_CHECKING

from syncnorm.lightning._flavours import flavour

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    LightningCLI = import_module(f"{flavour()}.cli").LightningCLI

__all__ = ["run"]


def run(arguments: list[str] | None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; arguments from ``sys.argv`` where None."""
    _DigitsCLI(  # any model and any data, or none, by class path
        parser_kwargs={"prog": "syncnorm"},
        save_config_kwargs={"overwrite": True},  # a run without a logger has no folder of its own to keep it in
        args=arguments,
    )


class _DigitsCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: "LightningArgumentParser") -> None:
        parser.set_defaults(
            {
                "model": {"class_path": "syncnorm.lightning.DigitsMLP"},
                "data": {"class_path": "syncnorm.lightning.DigitsDataModule"},
            }
        )
