"""``build``."""

from dataclasses import dataclass

from syncnorm.cli._console import working
from syncnorm.conversion._table import Report

__all__ = ["build"]


@dataclass(frozen=True)
class _Built(Report):
    """Where the operators are, or why they are not."""

    path: str = ""
    failed: str = ""

    @property
    def ok(self) -> bool:
        return not self.failed

    def parts(self) -> list[str]:
        return [self.path or f"FAILED: {self.failed}"]


def build(*, force: bool = False, verbose: bool = False) -> Report:
    """Compile the native CPU operators, once per torch version and processor.

    They need a C++ compiler and half a minute. Without them torch's own operators serve; syncnorm.explain(layer) says which.

    Args:
        force: Compile even if they are built already.
        verbose: Show the compiler's command line.
    """
    from syncnorm.errors import SyncNormError
    from syncnorm.kernels import native

    try:
        with working("building the native operators (half a minute the first time)"):
            return _Built(path=str(native.build(force=force, verbose=verbose)))
    except SyncNormError as error:
        return _Built(failed=str(error))
