"""What each fault of :func:`syncnorm.testing.inject` does to the one call of a layer that it happens to."""

import copy
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["ACTS", "FaultInjected", "Site"]


class FaultInjected(RuntimeError):  # noqa: N818 - what happened, and on purpose
    """The exception of the fault ``"raise"``."""


class Site(NamedTuple):
    """A call that a fault happens to."""

    layer: nn.Module
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seconds: float

    def go(self, change: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Make the call, with the first argument changed."""
        args = self.args if change is None else (change(self.args[0]), *self.args[1:])
        return self.run(*args, **self.kwargs)

    def go_with_each(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Make the call, with every tensor of floats changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return self.run(*map(changed, self.args), **{name: changed(value) for name, value in self.kwargs.items()})


def _extra(site: Site) -> Any:
    site.go()
    return site.go()


def _eval(site: Site) -> Any:
    modes = [(module, module.training) for module in site.layer.modules()]
    site.layer.eval()
    try:
        return site.go()
    finally:
        for module, mode in modes:
            module.training = mode


def _no_grad(site: Site) -> Any:
    with torch.no_grad():
        return site.go()


def _channels(site: Site) -> Any:
    layer, narrow = site.layer, copy.copy(site.layer)
    del narrow.__dict__["forward"]
    channels = narrow.__dict__["num_features"] = layer.__dict__["num_features"] - 1
    narrow._buffers = {n: t[:-1] if t is not None and t.dim() else t for n, t in layer._buffers.items()}
    narrow._parameters = {n: p if p is None else nn.Parameter(p[:-1]) for n, p in layer._parameters.items()}
    x, *rest = site.args
    return torch.cat([narrow(x[:, :channels], *rest, **site.kwargs), x[:, channels:]], 1)


def _dtype(site: Site) -> Any:
    before = site.args[0].dtype
    y = site.go_with_each(lambda t: t.float() if t.dtype == torch.float64 else t.double())
    return y.to(before) if isinstance(y, Tensor) else y


def _nan(site: Site) -> Any:
    def spoil(x: Tensor) -> Tensor:
        return x.flatten().index_fill(0, torch.zeros(1, dtype=torch.int64, device=x.device), torch.nan).view(x.shape)

    return site.go(spoil)


def _drift(site: Site) -> Any:
    buffer = next(b for b in site.layer.buffers() if b.is_floating_point())
    buffer.view(-1)[0] += 1
    return site.go()


def _raise(site: Site) -> Any:
    raise FaultInjected("this rank was asked to fail here")


def _stuck(site: Site) -> Any:
    time.sleep(site.seconds)
    return site.go()


def _stop(site: Site) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    return site.go()  # if somebody wakes it


def _exit(site: Site) -> Any:
    os._exit(3)


def _kill(site: Site) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


ACTS: dict[str, Callable[[Site], Any]] = {
    "skip": lambda site: site.args[0], "extra": _extra, "eval": _eval, "no_grad": _no_grad, "channels": _channels,
    "dtype": _dtype, "bad_input": lambda site: site.go(lambda x: x[:, :-1]),
    "empty": lambda site: site.go_with_each(lambda t: t[:0]), "nan": _nan, "drift": _drift, "raise": _raise,
    "stuck": _stuck, "stop": _stop, "exit": _exit, "kill": _kill,
}  # fmt: skip
