"""The callback that looks at a model's norms every now and then while it trains, and logs how they are.

Between two looks nothing is on the model. At one, hooks are there for one batch, and ranks meet once.
"""

# T looks, L layers

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncnorm.diagnostics._heat_map import QUANTITIES, heat_map
from syncnorm.diagnostics._norm_metrics import (
    DeadChannels,
    EffectiveBatch,
    ExchangeCost,
    NormMetric,
    RenormClipRate,
    RunningStatDrift,
    TrainEvalGap,
    meet,
)
from syncnorm.diagnostics._norm_probe import RENORM, NormProbe
from syncnorm.diagnostics._norm_rows import Array
from syncnorm.distributed.groups import LOCAL, GroupSpec, resolve
from syncnorm.lightning._flavours import Callback, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["NormMonitor"]

_VERSION = 1
_MOST_LOOKS = 512
_KINDS = (TrainEvalGap, EffectiveBatch, DeadChannels)
_OVER_RANKS = (RunningStatDrift, ExchangeCost)


class NormMonitor(Callback):
    """Log the health of all batch norms, ours and torch's, every n steps, to any logger.

    - ``sn/gap``, ``sn/gap_max``: evaluation against training, in σ. Statistics that lag, or data unlike the data before.
    - ``sn/batch``: values behind a statistic, the smallest of all layers.
    - ``sn/noise``: share of the variance that is between ranks' batches, the largest of all layers.
    - ``sn/drift``, ``sn/drift_max``: running statistics across ranks, in σ; 0 if synchronised.
    - ``sn/dead``, ``sn/saturated``: shares of channels that say nothing any longer.
    - ``sn/clip_r``, ``sn/clip_d``: shares of channels that batch renormalisation clipped.
    - ``sn/exchange_ms``, ``sn/exchange_kb``, ``sn/exchanges``: time, bytes and number of exchanges per step and rank.

    What is not known is not logged: noise, drift and exchanges in one process, clipping without batch renorm. See
    :mod:`syncnorm.diagnostics` for what each is exactly. All are of the one batch that is looked at, over all ranks.

    When the fit ends, a heat map of gap, noise and drift, layers by steps, goes to TensorBoard as the figure ``sn/norms``; for
    other loggers, and without one, to ``sn_norms.png`` in the log directory, which is the Trainer's where the logger has none.
    It needs matplotlib.

    Ranks meet once per look, in one gather, and draw no random numbers. Where the model is compiled, the batch that is looked
    at runs as it was written, since compiled code does not see hooks. With gradient accumulation it is the first micro-batch
    of a step.

    Args:
        every_n_steps: Optimizer steps from one look to the next.
        include: Globs on qualified names; only these layers. Empty for all.
        exclude: Globs on qualified names; not these.
        heat_map: Whether to draw one.

    Raises:
        ValueError: If ``every_n_steps`` is not a whole number of at least 1; when the fit starts, if a glob matches nothing.

    Example:
        >>> trainer = Trainer(callbacks=[syncnorm.SyncNorm(), syncnorm.NormMonitor()])  # doctest: +SKIP
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        heat_map: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"NormMonitor: every_n_steps must be a whole number of at least 1, got {every_n_steps!r}.")
        self.every_n_steps, self.heat_map = every_n_steps, heat_map
        self.include, self.exclude = ([g] if isinstance(g, str) else list(g) for g in (include, exclude))
        # Made once: Lightning asks for it at every hook of every batch.
        self._state_key = self._generate_state_key(include=self.include, exclude=self.exclude)
        self._probe: NormProbe | None = None
        self._metrics: list[NormMetric] = []
        self._is_looking, self._looks = False, 0
        self._layers: list[str] = []
        self._steps: list[int] = []
        self._history: dict[str, list[Tensor]] = {key: [] for key in QUANTITIES}

    @property
    def state_key(self) -> str:
        """Apart for callbacks on different layers."""
        return self._state_key

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._is_looking, self._looks = False, trainer.global_step // self.every_n_steps
        try:
            self._probe = NormProbe(pl_module, self.include or None, self.exclude or None)
        except ValueError as error:
            if self.include or self.exclude:
                raise
            self._probe = None
            rank_zero_warn(f"NormMonitor has no effect: {error}")
            return
        kinds: list[type[NormMetric]] = [*_KINDS, *(_OVER_RANKS if trainer.world_size > 1 else ())]
        if any(isinstance(layer, RENORM) for layer in self._probe.layers.values()):
            kinds.append(RenormClipRate)
        self._metrics = [kind(self._probe, sync_on_compute=False) for kind in kinds]
        if self._layers != list(self._probe.names):  # else this is a resumption
            self._forget(list(self._probe.names))

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        # Several optimizers count several steps a batch, and micro-batches none.
        looks = (trainer.global_step + 1) // self.every_n_steps
        if self._probe is not None and looks > self._looks:
            self._looks, self._is_looking = looks, True
            self._probe.__enter__()

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_looking or self._probe is None:
            return
        self._is_looking = False
        self._probe.__exit__(None, None, None)
        assert self._probe.reading is not None
        for metric in self._metrics:
            metric.take(self._probe.reading)
        meet(self._metrics, resolve(GroupSpec()) if trainer.world_size > 1 else LOCAL)
        layers: dict[str, Array] = {}
        logged: dict[str, float] = {}
        for metric in self._metrics:
            found = metric.layers()
            layers |= found
            logged |= {f"sn/{key}": v for key, v in metric.summary(found).items() if not math.isnan(v)}
        self._remember(trainer.global_step, layers)
        # Past self.log, which would drop what does not fall on log_every_n_steps; as Lightning's LearningRateMonitor.
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update(zip(logged, torch.tensor(list(logged.values())).unbind(), strict=True))

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.heat_map and self._steps and trainer.is_global_zero:
            self._draw(trainer)

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What the heat map shows so far, as plain data."""
        history = {key: torch.stack(rows) for key, rows in self._history.items() if rows}
        return {"version": _VERSION, "layers": self._layers, "steps": self._steps, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the heat map of the run that is resumed."""
        self._forget(list(state_dict["layers"]))
        self._steps = list(state_dict["steps"])
        for key, rows in state_dict["history"].items():
            self._history[key] = list(rows)

    def _forget(self, layers: list[str]) -> None:
        self._layers, self._steps = layers, []
        self._history = {key: [] for key in QUANTITIES}

    def _remember(self, step: int, found: dict[str, Array]) -> None:
        self._steps.append(step)
        for key, rows in self._history.items():
            known = torch.tensor(found[key]) if key in found else torch.full((len(self._layers),), torch.nan)
            rows.append(known.float())
        if len(self._steps) > _MOST_LOOKS:  # a long run keeps every second look, and so on
            self._steps = self._steps[1::2]
            self._history = {key: rows[1::2] for key, rows in self._history.items()}

    def _draw(self, trainer: "Trainer") -> None:
        if find_spec("matplotlib") is None:
            rank_zero_warn("NormMonitor draws no heat map: pip install matplotlib, or pass heat_map=False.")
            return
        values = {key: torch.stack(rows) for key, rows in self._history.items()}
        figure = heat_map(values, self._layers, self._steps)
        if figure is None:
            return
        homes = [] if trainer.loggers else [trainer.default_root_dir]
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_figure"):
                experiment.add_figure("sn/norms", figure, self._steps[-1])
            else:
                homes.append(getattr(logger, "log_dir", None) or logger.save_dir or trainer.default_root_dir)
        for home in dict.fromkeys(homes):
            Path(home).mkdir(parents=True, exist_ok=True)
            figure.savefig(Path(home) / "sn_norms.png")

    def _close(self) -> None:
        if self._probe is not None:
            self._probe.close()
        self._probe, self._is_looking = None, False
