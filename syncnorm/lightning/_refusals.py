"""What SyncNorm refuses, before anything is changed: each case would end in a wrong result without a word."""

from typing import TYPE_CHECKING

from syncnorm.conversion._plan import shorten
from syncnorm.errors import SyncNormError
from syncnorm.lightning._flavours import is_kind_of
from syncnorm.lightning._surgery import Surgery

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["refuse_copied", "refuse_late", "refuse_rivals", "refuse_workers"]


def refuse_rivals(surgery: Surgery, trainer: "Trainer", pl_module: "LightningModule", others: list[Surgery]) -> None:
    """Lightning's own flag, which would take our layers for batch norms to convert; a second SyncNorm on a layer."""
    layer_sync = getattr(trainer.strategy, "_layer_sync", None)
    if surgery.keeps_keys and is_kind_of(layer_sync, "TorchSyncBatchNorm"):
        raise SyncNormError(
            "SyncNorm: Trainer(sync_batchnorm=True) would replace these layers by torch SyncBatchNorm (GPU only). "
            "Remove sync_batchnorm=True."
        )
    both = [name for other in others for name in surgery.selected(pl_module, other.touched)]
    if both:
        raise SyncNormError(
            f"two SyncNorm callbacks select the same {len(both)} layers: {shorten(both)}. Keep one callback, or part "
            "them with include= and exclude=."
        )


def refuse_workers(surgery: Surgery, trainer: "Trainer", pl_module: "LightningModule") -> None:
    """Another architecture in worker processes: the main process loads their weights into the old one, not strictly."""
    launcher = trainer.strategy.launcher
    if surgery.keeps_keys or not is_kind_of(launcher, "_MultiProcessingLauncher") or not surgery.pending(pl_module):
        return
    method = getattr(launcher, "_start_method", "spawn")
    raise SyncNormError(
        f"SyncNorm(to={surgery.to!r}) changes the architecture and cannot be carried back from "
        f"strategy='ddp_{method}'. Call syncnorm.convert(model, to={surgery.to!r}) before Trainer.fit."
    )


def refuse_late(surgery: Surgery, pl_module: "LightningModule") -> None:
    """Another architecture for layers that the strategy and the optimizer have seen already."""
    if surgery.keeps_keys:
        return
    fix = f"Call syncnorm.convert(self, to={surgery.to!r}) in configure_model, as soon as the layers are made."
    try:
        late = surgery.pending(pl_module)
    except SyncNormError as error:
        raise SyncNormError(f"SyncNorm: {error} {fix}") from error
    if late:
        raise SyncNormError(
            f"SyncNorm(to={surgery.to!r}) changes the architecture, and {len(late)} batch norms ({shorten(late)}) were "
            f"made after Callback.setup, too late for the strategy and the optimizer. {fix}"
        )


def refuse_copied(surgery: Surgery, trainer: "Trainer", pl_module: "LightningModule") -> None:
    """More buffers for layers of which WeightAveraging has a copy: it pairs the buffers of both by position."""
    if "accumulate" not in surgery.options and surgery.to != "batch_renorm":
        return
    averaging = [c for c in getattr(trainer, "callbacks", []) if is_kind_of(c, "WeightAveraging")]
    if any(getattr(c, "_average_model", None) is not None for c in averaging) and surgery.pending(pl_module):
        raise SyncNormError(
            f"SyncNorm(to={surgery.to!r}{''.join(f', {name}={value!r}' for name, value in surgery.options.items())}) adds "
            f"buffers to layers that {type(averaging[0]).__name__} has copied already. Put SyncNorm before it in "
            "callbacks=[...], and make the layers in __init__."
        )
