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
    from syncnorm.diagnostics._norm_metrics import DeadChannels as DeadChannels
    from syncnorm.diagnostics._norm_metrics import EffectiveBatch as EffectiveBatch
    from syncnorm.diagnostics._norm_metrics import ExchangeCost as ExchangeCost
    from syncnorm.diagnostics._norm_metrics import RenormClipRate as RenormClipRate
    from syncnorm.diagnostics._norm_metrics import RunningStatDrift as RunningStatDrift
    from syncnorm.diagnostics._norm_metrics import TrainEvalGap as TrainEvalGap
    from syncnorm.diagnostics._norm_probe import NormProbe as NormProbe
    from syncnorm.diagnostics._norm_probe import NormReading as NormReading
    from syncnorm.diagnostics._verify import VerifyReport as VerifyReport
    from syncnorm.diagnostics._verify import VerifyRow as VerifyRow
    from syncnorm.diagnostics._verify import verify as verify

__all__ = [
    "Advice",
    "AdviceRow",
    "AuditReport",
    "DeadChannels",
    "DoctorReport",
    "Drift",
    "EffectiveBatch",
    "ExchangeCost",
    "Finding",
    "NormInfo",
    "NormList",
    "NormProbe",
    "NormReading",
    "NormReport",
    "NormRow",
    "RenormClipRate",
    "RunningStatDrift",
    "Subject",
    "TrainEvalGap",
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
    "DeadChannels": "_norm_metrics",
    "EffectiveBatch": "_norm_metrics",
    "ExchangeCost": "_norm_metrics",
    "RenormClipRate": "_norm_metrics",
    "RunningStatDrift": "_norm_metrics",
    "TrainEvalGap": "_norm_metrics",
    "NormProbe": "_norm_probe",
    "NormReading": "_norm_probe",
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
