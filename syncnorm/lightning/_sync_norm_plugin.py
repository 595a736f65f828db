"""The plugin: Lightning's own place for synchronised layers, which DDP and FSDP consult and no other strategy."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from syncnorm.conversion import To
from syncnorm.conversion._targets import STATISTICS_FAMILIES
from syncnorm.lightning._flavours import LayerSync, rank_zero_info, rank_zero_warn
from syncnorm.lightning._surgery import Surgery

__all__ = ["SyncNormPlugin"]


class SyncNormPlugin(LayerSync):
    """Synchronise a model's batch norms while it is fitted: ``Trainer(strategy="ddp", plugins=[SyncNormPlugin()])``.

    Lightning asks such a plugin under DDP and FSDP only. On a single device, under ModelParallel (FSDP2) and DeepSpeed,
    and in Fabric it is ignored without a word, and the plugin has no way to know: there, use the callback
    :class:`syncnorm.SyncNorm` or :func:`syncnorm.convert`. Beside the callback it does no harm; who comes second
    finds the work done. With ``accumulate=`` or ``"batch_renorm"``, which add buffers, WeightAveraging needs the
    callback, placed before it: it copies the model before a plugin is asked.

    Args:
        to: ``"sync_batch_norm"``, ``"batch_renorm"`` or ``"frozen_batch_norm"``. Norms without a batch have other
            state-dict keys; Lightning would save a model under one architecture and restore it under another, so they
            are refused.
        include: As for :class:`syncnorm.SyncNorm`.
        exclude: As for :class:`syncnorm.SyncNorm`.
        process_group: As for :class:`syncnorm.SyncNorm`.
        strict: As for :class:`syncnorm.SyncNorm`.
        backend: As for :class:`syncnorm.SyncNorm`.
        accumulate: As for :class:`syncnorm.SyncNorm`.

    Raises:
        ValueError: For another ``to`` or a value out of range.
    """

    def __init__(
        self,
        to: To = "sync_batch_norm",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        process_group: Literal["world", "node"] | int | None = None,
        strict: bool = False,
        backend: str = "auto",
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        if to in get_args(To) and to not in STATISTICS_FAMILIES:
            raise ValueError(
                f"SyncNormPlugin(to={to!r}) would change the architecture after Lightning has restored the checkpoint, "
                f"and back when the fit ends. Use the callback SyncNorm(to={to!r}), or call syncnorm.convert(model, "
                f"to={to!r}) before the Trainer."
            )
        self._surgery = Surgery(
            to,
            include,
            exclude,
            strict,
            process_group=process_group,
            backend=None if backend == "auto" else backend,
            accumulate=None if accumulate == 1 else accumulate,
        )

    def apply(self, model: nn.Module) -> nn.Module:
        self._surgery.run(model, last=True)
        if self._surgery.found_nothing():
            rank_zero_warn(
                "SyncNormPlugin found no batch norm to convert, so it has no effect; print(syncnorm.inspect(model))."
            )
        else:
            rank_zero_info(f"SyncNormPlugin: {self._surgery.summary()}")
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        self._surgery.undo()
        return model
