"""The callback of precise batch norm: what is validated and saved evaluates by statistics that belong to its weights.

It reads the training data anew and leaves no trace in training but the running statistics.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from syncnorm.calibration import recalibrate
from syncnorm.calibration._layers import call_with_first_tensor, unwrap
from syncnorm.calibration._recalibrate import measured_norms
from syncnorm.lightning._flavours import Callback, flavour, is_kind_of, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["PreciseBatchNorm"]

_SECONDS = 3.0  # until there is a bar


class PreciseBatchNorm(Callback):
    """Recalibrate the batch norms (:func:`syncnorm.recalibrate`) in every n-th epoch, and in the last one.

    In such an epoch it happens at its end, before each validation and before each checkpoint that is saved, once for the
    same weights. All ranks take part; the training data is read anew, and random numbers and the order of the next epoch
    are as without it. Layers that are in evaluation mode while training stay as they are. Training goes on from the precise
    statistics, which only BatchRenorm and moving averages notice. Where an epoch has fewer batches than ``num_batches``,
    all of them are used. After a few seconds the progress bar of the Trainer shows how far it is.

    With weight averaging it is the averaged copy whose statistics are replaced, and not those of the model that trains.
    Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` are found by themselves; put this callback after them.

    Args:
        num_batches: Batches per rank.
        every_n_epochs: Epochs from one to the next.
        before_validation: Recalibrate before each validation of such an epoch.
        before_save: Recalibrate before each checkpoint that is saved in such an epoch. Lightning does not announce those of
            ``ModelCheckpoint(save_weights_only=True)``, which have the statistics of the last validation or epoch's end.
        averaged_model: Where a copy with averaged weights is: the name of an attribute of the LightningModule, which may
            have dots, or a function that takes the LightningModule and gives the copy.
        forward: How the model is called: the name of a method of the LightningModule that takes a batch (and logs nothing),
            or a function of a model and a batch. By default the model with the batch, or the tensor that it begins with.

    Raises:
        ValueError: If ``num_batches`` or ``every_n_epochs`` is not positive; when the fit starts, if the LightningModule
            has no ``forward`` or not the method of that name.

    Reference: Wu & Johnson (2021), arXiv:2105.07576, section 3.
    """

    def __init__(
        self,
        num_batches: int = 200,
        every_n_epochs: int = 1,
        before_validation: bool = True,
        before_save: bool = True,
        averaged_model: str | Callable[[Any], nn.Module] | None = None,
        forward: str | Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_batches", num_batches), ("every_n_epochs", every_n_epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"PreciseBatchNorm: {name} must be a whole number of at least 1, got {value!r}.")
        self.num_batches, self.every_n_epochs = num_batches, every_n_epochs
        self.before_validation, self.before_save = before_validation, before_save
        self.averaged_model, self.forward = averaged_model, forward
        self._done_at: tuple[int, int] | None = None
        self._fixed: set[nn.Module] | None = None
        self._is_idle = True

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._is_idle = True  # until there is data: what tunes the learning rate or batch size saves before

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._done_at, self._is_idle = None, False
        self._check_forward(pl_module)
        target = unwrap(self._target(trainer, pl_module))
        try:
            measured_norms(target)
        except ValueError as error:
            self._is_idle = True
            rank_zero_warn(f"PreciseBatchNorm has no effect: {error}")
        for callback in trainer.checkpoint_callbacks if self.before_save and not self._is_idle else ():
            if getattr(callback, "save_weights_only", False) and getattr(callback, "_every_n_train_steps", 0):
                rank_zero_warn(
                    "PreciseBatchNorm is not told of checkpoints with save_weights_only=True, and every_n_train_steps saves "
                    "them within epochs: their statistics will be older than their weights. Set save_weights_only=False."
                )

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._fixed = None

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        # At the first batch of the epoch, which a resumed one does not begin with 0. Where a validation has begun,
        # everything is in evaluation mode.
        if self._fixed is None:
            self._fixed = {module for module in pl_module.modules() if not module.training}

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.before_validation and not trainer.sanity_checking:
            self._recalibrate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._recalibrate(trainer, pl_module)

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        if self.before_save and self._recalibrate(trainer, pl_module):
            # What Lightning has collected shares its memory with the model, but where it was gathered from shards.
            state: dict[str, Any] = checkpoint[
                "current_model_state" if "current_model_state" in checkpoint else "state_dict"
            ]
            for name, buffer in pl_module.named_buffers():
                if name.endswith(("running_mean", "running_var")) and isinstance(state.get(name), Tensor):
                    state[name] = buffer.detach()

    def _recalibrate(self, trainer: "Trainer", pl_module: "LightningModule") -> bool:
        if self._is_idle or not self._is_due(trainer):
            return False
        model = self._target(trainer, pl_module)
        now = trainer.global_step, int(getattr(model, "n_averaged", 0))
        if now == self._done_at:
            return False
        batches, num_batches = _training_batches(trainer, self.num_batches)
        bar = _Bar(trainer, num_batches)

        def step(model: nn.Module, batch: Any) -> None:
            # What Lightning does to a batch before a training step, in its order.
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                self._call(model, batch)
            bar.advance()

        try:
            with _modes(pl_module, self._fixed or set()):
                recalibrate(model, batches, num_batches, forward=step)
        finally:
            bar.close()
        self._done_at = now
        return True

    def _is_due(self, trainer: "Trainer") -> bool:
        if trainer.state.fn != "fit" or trainer.state.status != "running":
            return False  # after an exception a single rank may save
        epoch, steps = trainer.current_epoch + 1, trainer.max_steps
        last = trainer.should_stop or epoch == trainer.max_epochs or 0 <= steps <= trainer.global_step
        return last or epoch % self.every_n_epochs == 0

    def _target(self, trainer: "Trainer", pl_module: "LightningModule") -> nn.Module:
        if callable(self.averaged_model):
            model = self.averaged_model(pl_module)
        elif self.averaged_model is not None:
            try:
                model = attrgetter(self.averaged_model)(pl_module)
            except AttributeError as error:
                raise ValueError(f"PreciseBatchNorm: averaged_model={self.averaged_model!r}, and {error}.") from error
        else:
            averaging = (c for c in trainer.callbacks if is_kind_of(c, "WeightAveraging"))  # type: ignore[attr-defined]
            copies = (getattr(callback, "_average_model", None) for callback in averaging)
            model = next((c for c in copies if c is not None), trainer.strategy.model or pl_module)
        if not isinstance(model, nn.Module):
            raise TypeError(f"PreciseBatchNorm: averaged_model must lead to a module, got {type(model).__name__}.")
        return model

    def _check_forward(self, pl_module: "LightningModule") -> None:
        name = type(pl_module).__name__
        if isinstance(self.forward, str) and not callable(getattr(pl_module, self.forward, None)):
            raise ValueError(
                f"PreciseBatchNorm: forward={self.forward!r} must name a method, and {name} has none of it."
            )
        inherited = type(pl_module).forward.__qualname__ == "LightningModule.forward"
        if self.forward is None and inherited and not callable(self.averaged_model):
            raise ValueError(
                f"PreciseBatchNorm calls the model with the first tensor of a batch, and {name} has no forward. Define it, or "
                "name a method that takes a batch: PreciseBatchNorm(forward='embed')."
            )

    def _call(self, model: nn.Module, batch: Any) -> None:
        if isinstance(self.forward, str):
            getattr(model, self.forward)(batch)
        else:
            (self.forward or call_with_first_tensor)(model, batch)


@contextmanager
def _modes(module: nn.Module, fixed: set[nn.Module]) -> Iterator[None]:
    """Within: the modes in which ``module`` trains, where all of it but ``fixed`` does."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = part not in fixed
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _training_batches(trainer: "Trainer", num_batches: int) -> tuple[Iterable[Any], int | None]:
    """The training data from the start, and how many of its batches to take; None where it ends there by itself."""
    loaders: Any = trainer.train_dataloader
    limit = int(min(num_batches, trainer.num_training_batches))
    if isinstance(loaders, (list, tuple, dict)):
        combined = import_module(f"{flavour()}.utilities.combined_loader").CombinedLoader(loaders, "min_size")
        combined.flattened = [_anew(loader) for loader in combined.flattened]
        return (batch for batch, _, _ in islice(combined, limit)), None
    try:
        return _anew(loaders), min(limit, len(loaders))
    except (TypeError, NotImplementedError):  # an iterable dataset
        return islice(_anew(loaders), limit), None


def _anew(loader: Any) -> Any:
    """A loader whose iteration leaves that of the epoch alone: one with persistent workers has a single iterator."""
    if not getattr(loader, "persistent_workers", False):
        return loader
    twin = copy(loader)
    twin._iterator = None
    return twin


class _Bar:
    """A line in the Trainer's progress bar, if it takes longer than a few seconds.

    Args:
        trainer: Whose.
        total: Batches to come.
    """

    def __init__(self, trainer: "Trainer", total: int | None) -> None:
        self.progress: Any = trainer.progress_bar_callback if trainer.is_global_zero else None
        self.total, self.count, self.began = total, 0, time.monotonic()
        self.bar: Any = None

    def advance(self) -> None:
        """One batch is done."""
        self.count += 1
        if self.progress is None or self.progress.is_disabled or time.monotonic() - self.began < _SECONDS:
            return
        if hasattr(self.progress, "init_validation_tqdm"):
            if self.bar is None:
                self.bar = self.progress.init_validation_tqdm()
                self.bar.reset(self.total)
                self.bar.set_description("Recalibration")
            self.bar.update(self.count - self.bar.n)
        elif getattr(self.progress, "progress", None) is not None:  # rich
            if self.bar is None:
                self.bar = self.progress._add_task(self.total, "Recalibration")
            self.progress._update(self.bar, self.count)

    def close(self) -> None:
        """Take the line away."""
        if self.bar is None:
            return
        if hasattr(self.bar, "close"):
            self.bar.close()
        else:
            self.progress._update(self.bar, self.count, visible=False)
