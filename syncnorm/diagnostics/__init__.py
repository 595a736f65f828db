"""What is in a model, why a layer takes the path it takes, and whether many ranks equal one process."""

import importlib
from typing import TYPE_CHECKING, Any

from syncnorm.diagnostics._audit import audit
from syncnorm.diagnostics._audit_report import AuditReport, Drift
from syncnorm.diagnostics._catalogue import NormInfo, NormList, list_norms
from syncnorm.diagnostics._explain import explain
from syncnorm.diagnostics._inspect import NormReport, NormRow, inspect

if TYPE_CHECKING:
    from syncnorm.diagnostics._advice import Advice as Advice
    from syncnorm.diagnostics._advice import AdviceRow as AdviceRow
    from syncnorm.diagnostics._advise import advise as advise
    from syncnorm.diagnostics._doctor import DoctorReport as DoctorReport
    from syncnorm.diagnostics._doctor import doctor as doctor
    from syncnorm.diagnostics._findings import Finding as Finding
    from syncnorm.diagnostics._findings import Subject as Subject
    from syncnorm.diagnostics._verify import VerifyReport as VerifyReport
    from syncnorm.diagnostics._verify import VerifyRow as VerifyRow
    from syncnorm.diagnostics._verify import verify as verify

__all__ = [
    "Advice",
    "AdviceRow",
    "AuditReport",
    "DoctorReport",
    "Drift",
    "Finding",
    "NormInfo",
    "NormList",
    "NormReport",
    "NormRow",
    "Subject",
    "VerifyReport",
    "VerifyRow",
    "advise",
    "audit",
    "doctor",
    "explain",
    "inspect",
    "list_norms",
    "verify",
]


# They need what starts ranks, or torchmetrics, or are needed once in a model's life.
_LAZY = {
    "Advice": "_advice",
    "AdviceRow": "_advice",
    "advise": "_advise",
    "DoctorReport": "_doctor",
    "Finding": "_findings",
    "Subject": "_findings",
    "VerifyReport": "_verify",
    "VerifyRow": "_verify",
    "doctor": "_doctor",
    "verify": "_verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"syncnorm.diagnostics.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
