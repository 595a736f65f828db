"""One look at an installation and a model: versions, backends, a trial on two ranks, and what is known to go wrong."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from syncnorm._version import __version__
from syncnorm.conversion._table import Report
from syncnorm.diagnostics._findings import Finding, Subject, find
from syncnorm.diagnostics._selftest import Trial, selftest
from syncnorm.distributed.collectives import available_backends
from syncnorm.kernels import objections
from syncnorm.kernels.rows import row_objections

__all__ = ["DoctorReport", "doctor"]

_PACKAGES = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "jsonargparse", "triton", "torchvision")


@dataclass(frozen=True)
class DoctorReport(Report):
    """What :func:`doctor` found; true if there is nothing to mend. Prints as text.

    Attributes:
        environment: Versions and devices, by name.
        backends: By kind of norm and device, what each kernel backend says: None if it serves, else why not.
        trials: The self-test; empty if it was not run.
        findings: What is to be mended.
        not_checked: What could not be looked at, and how it could.
    """

    environment: dict[str, str]
    backends: dict[str, dict[str, str | None]]
    trials: tuple[Trial, ...]
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every trial passed and nothing was found."""
        return all(trial.ok for trial in self.trials) and not self.findings

    def parts(self) -> list[str]:
        lines = ["environment", *(f"  {name} {value}" for name, value in self.environment.items())]
        for kind, answers in self.backends.items():
            lines.append(f"kernel backends, {kind}")
            lines += [f"  {name}: {why or 'serves'}" for name, why in answers.items()]
        if self.trials:
            lines.append("two ranks on this machine")
            lines += [f"  {'ok' if t.ok else 'FAILED'}: {t.name} ({t.seconds:g} s): {t.detail}" for t in self.trials]
        lines.append(f"findings: {len(self.findings) or 'none'}")
        lines += [f"  {number}. {finding}" for number, finding in enumerate(self.findings, 1)]
        lines += [f"not checked: {text}" for text in self.not_checked]
        return lines


def doctor(subject: Subject | None = None, *, trials: bool = True, timeout: float = 60.0) -> DoctorReport:
    """Examine this installation and, if there is one, a model.

    In a script, call it below ``if __name__ == "__main__":``, as everything that starts processes.

    Args:
        subject: The model with what is known of its use.
        trials: Whether to run the self-test: two processes on this machine's loopback, some seconds.
        timeout: Seconds for each of its three trials.

    Raises:
        ValueError: If ``timeout`` is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds above 0, got {timeout}.")
    findings = [*_environment_findings(), *([] if subject is None else find(subject))]
    not_checked = []
    if subject is None:
        not_checked.append("a model; name one as pkg.mod:factory")
    elif subject.input is None:
        not_checked.append("sizes of batches; let the factory return (model, input), or give --shape")
    if subject is not None and subject.ranks is None:
        not_checked.append("groups against the number of ranks; give --ranks")
    return DoctorReport(
        environment=_environment(),
        backends=_backends(),
        trials=selftest(timeout) if trials else (),
        findings=tuple(findings),
        not_checked=tuple(not_checked),
    )


def _environment() -> dict[str, str]:
    found = {"syncnorm": __version__, "python": platform.python_version()}
    found |= {name: number for name in _PACKAGES if (number := _version(name))}
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["devices"] = ", ".join([f"cpu ({torch.get_num_threads()} threads)", *_accelerators()])
    found["collectives"] = ", ".join(available_backends()) or "none: torch was built without torch.distributed"
    return found


def _accelerators() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _backends() -> dict[str, dict[str, str | None]]:
    found = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        x = torch.zeros(2, 4, 3, 3, device=device)
        found[f"batch norms on {device}"] = objections(x)
        found[f"layer and RMS norms on {device}"] = row_objections(x.flatten(1))
    return found


def _environment_findings() -> list[Finding]:
    found = []
    torchs, vision, lightning = (
        _version("torch"),
        _version("torchvision"),
        _version("lightning") or _version("pytorch-lightning"),
    )
    if vision and "+" in torchs and torchs.partition("+")[2] != vision.partition("+")[2]:
        problem = f"torchvision {vision} beside torch {torchs}: of another build, it does not load, and then Lightning does not"
        found.append(Finding("torchvision", problem, "Install both from the same index, or pip uninstall torchvision."))
    if _before(torchs, (2, 6)):
        problem = f"torch {torchs}: weights_only=True can be made to run code before 2.6 (CVE-2025-32434)"
        found.append(Finding("old-torch", problem, "Install torch>=2.6."))
    if lightning and _before(lightning, (2, 6)):
        problem = f"Lightning {lightning} loads checkpoints as pickles, which may run code"
        found.append(Finding("old-lightning", problem, "Install lightning>=2.6 before loading files of others."))
    return found


def _before(number: str, floor: tuple[int, int]) -> bool:
    return tuple(int(part) for part in number.split(".")[:2]) < floor
