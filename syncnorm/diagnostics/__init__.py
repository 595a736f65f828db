"""What is in a model, why a layer takes the path it takes, and whether many ranks equal one process."""

import importlib
from typing import TYPE_CHECKING, Any

from syncnorm.diagnostics._audit import audit
from syncnorm.diagnostics._audit_report import AuditReport, Drift
from syncnorm.diagnostics._catalogue import NormInfo, NormList, list_norms
from syncnorm.diagnostics._explain import explain
from syncnorm.diagnostics._inspect import NormReport, NormRow, inspect

if TYPE_CHECKING:
    from syncnorm.diagnostics._verify import VerifyReport as VerifyReport
    from syncnorm.diagnostics._verify import VerifyRow as VerifyRow
    from syncnorm.diagnostics._verify import verify as verify

__all__ = [
    "AuditReport",
    "Drift",
    "NormInfo",
    "NormList",
    "NormReport",
    "NormRow",
    "VerifyReport",
    "VerifyRow",
    "audit",
    "explain",
    "inspect",
    "list_norms",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("VerifyReport", "VerifyRow", "verify"):  # needs what starts ranks, which nothing else here does
        return getattr(importlib.import_module("syncnorm.diagnostics._verify"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
