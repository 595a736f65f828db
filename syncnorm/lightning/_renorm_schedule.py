"""The schedule of batch renormalisation: plain batch norm first, then limits that widen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from syncnorm.lightning._flavours import Callback, rank_zero_warn
from syncnorm.modules._batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["RenormSchedule"]

_LAYERS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


class RenormSchedule(Callback):
    """Move ``r_max`` and ``d_max`` of every batch renormalisation layer with the optimizer's steps.

    Each limit rises linearly from where plain batch norm has it (r_max = 1, d_max = 0) at ``warmup_steps`` to its final
    value. The defaults are the paper's, for runs of several 100,000 steps: 5,000 steps of batch norm, r_max at 3 after
    40,000, d_max at 5 after 25,000. Scale them to a shorter run, or it ends as batch norm. The limits depend on
    ``trainer.global_step`` alone, so that a resumed run goes on where it was. Logged: ``sn/r_max``, ``sn/d_max`` and the
    shares of channels that were clipped, ``sn/clip_r`` and ``sn/clip_d`` (means over layers).

    Args:
        warmup_steps: Steps of plain batch norm.
        r_steps: Step at which r_max is reached; at least ``warmup_steps``.
        d_steps: Step at which d_max is reached; at least ``warmup_steps``.
        r_max: Final limit of the scale, at least 1.
        d_max: Final limit of the mean, at least 0.
        every_n_steps: Steps between two logged values, each of which reads the device.

    Raises:
        ValueError: For limits out of range or steps out of order.

    Reference: Ioffe (2017), arXiv:1702.03275, section 4.1.
    """

    def __init__(
        self,
        warmup_steps: int = 5_000,
        r_steps: int = 40_000,
        d_steps: int = 25_000,
        r_max: float = 3.0,
        d_max: float = 5.0,
        every_n_steps: int = 50,
    ) -> None:
        super().__init__()
        for name, steps in (("r_steps", r_steps), ("d_steps", d_steps)):
            if not 0 <= warmup_steps <= steps:
                raise ValueError(
                    f"RenormSchedule: warmup_steps must be at least 0 and at most {name}; got {warmup_steps} and {steps}."
                )
        if r_max < 1 or d_max < 0:
            raise ValueError(f"RenormSchedule: r_max must be at least 1 and d_max at least 0; got {r_max} and {d_max}.")
        self.warmup_steps, self.r_steps, self.d_steps = warmup_steps, r_steps, d_steps
        if every_n_steps < 1:
            raise ValueError(f"RenormSchedule: every_n_steps must be at least 1, got {every_n_steps}.")
        self.r_max, self.d_max, self.every_n_steps = r_max, d_max, every_n_steps

    def limits(self, step: int) -> tuple[float, float]:
        """r_max and d_max while the optimizer has made ``step`` steps."""
        r, d = (_ramp(step, self.warmup_steps, end) for end in (self.r_steps, self.d_steps))
        return 1 + r * (self.r_max - 1), d * self.d_max

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not any(isinstance(module, _LAYERS) for module in pl_module.modules()):
            rank_zero_warn(
                "RenormSchedule found no batch renormalisation layer, so it has no effect; convert with "
                "SyncNorm(to='batch_renorm') or syncnorm.convert(model, to='batch_renorm')."
            )

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        r_max, d_max = self.limits(trainer.global_step)
        for module in pl_module.modules():
            if isinstance(module, _LAYERS):
                module.r_max, module.d_max = r_max, d_max

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rates = _clip_rates(pl_module) if trainer.global_step % self.every_n_steps == 0 else ()
        if rates:
            r_max, d_max = self.limits(trainer.global_step)
            clip_r, clip_d = (sum(column) / len(rates) for column in zip(*rates, strict=True))
            values = {"sn/r_max": r_max, "sn/d_max": d_max, "sn/clip_r": clip_r, "sn/clip_d": clip_d}
            self.log_dict(values)  # type: ignore[attr-defined]  # the Trainer gives it to callbacks


def _ramp(step: int, begin: int, end: int) -> float:
    if step >= end:
        return 1.0 if step >= begin else 0.0
    return max(0.0, (step - begin) / (end - begin)) if end > begin else 0.0


def _clip_rates(model: Any) -> Sequence[tuple[float, float]]:
    return [module.clip_rate for module in model.modules() if isinstance(module, _LAYERS)]
