"""Who serves: the rule that batch norms and row norms share."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from syncnorm.errors import SyncNormError

__all__ = ["check_name", "pick"]


class _Objecting(Protocol):
    def objection(self, x: Tensor) -> str | None: ...


_Backend = TypeVar("_Backend", bound=_Objecting)


def pick(backends: Mapping[str, _Backend], name: str, x: Tensor) -> _Backend:
    """The backend for ``x``: by name, or the first without an objection for ``"auto"``.

    Raises:
        ValueError: For an unknown name.
        SyncNormError: If a backend asked for by name objects.
    """
    if name == "auto":
        for backend in backends.values():
            if backend.objection(x) is None and not _stands_back(backend, x):
                return backend
    check_name(backends, name)
    reason = backends[name].objection(x)
    if reason is not None:
        raise SyncNormError(f"backend={name!r} was asked for and cannot run: {reason} Use backend='auto'.")
    return backends[name]


def _stands_back(backend: object, x: Tensor) -> bool:
    """Whether a backend that could serve leaves ``x`` to the next one unless it is asked for by name."""
    rule = getattr(backend, "stands_back", None)
    return rule is not None and rule(x)


def check_name(backends: Mapping[str, object], name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or that of a backend."""
    if name != "auto" and name not in backends:
        raise ValueError(f"backend must be one of {['auto', *backends]}, got {name!r}.")
