"""Adaptive gradient clipping before every optimizer step, for networks without batch norm."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from syncnorm.errors import SyncNormError
from syncnorm.functional import adaptive_gradient_clip_
from syncnorm.lightning._flavours import Callback, is_kind_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["AdaptiveGradientClipping"]

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class AdaptiveGradientClipping(Callback):
    """Bound the gradient of every filter by the norm of its weight; see :func:`adaptive_gradient_clip_`.

    Runs once per optimizer step, after accumulation, the average over ranks and unscaling (16-bit mixed precision), and
    before ``Trainer(gradient_clip_val=...)``, which may stand beside it. Logs ``sn/clipped``, the share of filters that
    were clipped. Works with automatic and manual optimization and several optimizers.

    Args:
        clip_factor: λ: the largest ratio of gradient norm to weight norm.
        eps: What counts as the norm of a smaller weight.
        exclude: Globs on qualified parameter names that are not clipped; the paper leaves out the last linear layer
            (``["head.*"]``).

    Raises:
        ValueError: If a number is not positive, or, when fitting starts, a glob matches no parameter.
        SyncNormError: Under FSDP, ModelParallel and DeepSpeed, where a rank holds pieces of filters.

    Example:
        >>> trainer = Trainer(callbacks=[AdaptiveGradientClipping(exclude=["head.*"])])  # doctest: +SKIP

    Reference: Brock, De, Smith & Simonyan (2021), equation 3.
    """

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()) -> None:
        super().__init__()
        for name, value in (("clip_factor", clip_factor), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"AdaptiveGradientClipping: {name} must be positive, got {value}.")
        if isinstance(exclude, str):
            raise ValueError(
                f"AdaptiveGradientClipping: exclude is a list of globs, got {exclude!r}. Use [{exclude!r}]."
            )
        self.clip_factor, self.eps, self.exclude = clip_factor, eps, tuple(exclude)

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        for name in _SHARDING:
            if stage == "fit" and is_kind_of(trainer.strategy, name):
                raise SyncNormError(
                    f"AdaptiveGradientClipping needs whole filters on every rank, and {name} gives a rank pieces of them. "
                    "Use strategy='ddp', or Trainer(gradient_clip_val=...) instead."
                )

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        names = [name for name, _ in pl_module.named_parameters()]
        for glob in self.exclude:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"AdaptiveGradientClipping: exclude={glob!r} matches no parameter. They are called {names[0]!r} to "
                    f"{names[-1]!r}."
                    if names
                    else f"AdaptiveGradientClipping: exclude={glob!r} matches nothing: the module has no parameters."
                )

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        excluded = {
            id(parameter)
            for name, parameter in pl_module.named_parameters()
            if any(fnmatchcase(name, glob) for glob in self.exclude)
        }
        mine = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in excluded]
        share = adaptive_gradient_clip_(mine, self.clip_factor, self.eps)
        if share is not None:
            pl_module.log("sn/clipped", share)
