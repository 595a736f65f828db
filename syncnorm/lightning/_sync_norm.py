"""The callback: a model's batch norms are synchronised while it is fitted, and are themselves again afterwards.

It converts in ``setup``, before the strategy wraps the model, and again in ``on_fit_start``, for layers that
``configure_model`` made. After an exception Lightning calls ``on_exception`` and not ``teardown``; both give back.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from syncnorm.conversion import To
from syncnorm.conversion._layers import find_layers
from syncnorm.conversion._targets import TARGETS, default_of
from syncnorm.diagnostics import audit
from syncnorm.distributed import set_watch
from syncnorm.distributed.watch import patience
from syncnorm.errors import SyncNormError
from syncnorm.lightning._flavours import Callback, rank_zero_info, rank_zero_warn
from syncnorm.lightning._refusals import refuse_copied, refuse_late, refuse_rivals, refuse_workers
from syncnorm.lightning._surgery import Surgery

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SyncNorm"]

_VERSION = 1
_PATIENCE = 300.0


class SyncNorm(Callback):
    """Convert a model's batch norms for the time of ``Trainer.fit``.

    Works with every strategy: DDP (popen, spawn, fork, torchrun), FSDP, ModelParallel (FSDP2), a single device; also
    where ``configure_model`` makes the layers. The optimizer, EMA copies and checkpoints see the same parameters and
    keys as without it. With ``to="sync_batch_norm"`` (and its family) the original classes are back after ``fit``,
    also after an exception; ``validate``, ``test`` and ``predict`` need no conversion.

    The other targets are another architecture with other keys, and stay. They are made before ``fit`` and before
    ``validate``, ``test`` and ``predict`` too, so that a checkpoint of such a run can be evaluated. Under
    ``ddp_spawn`` and ``ddp_fork`` they would be lost on the way back from the worker processes and are refused.

    Callbacks on different layers (``include``, ``exclude``) may stand side by side. A checkpoint tells under
    ``"syncnorm"`` what its run was converted to.

    Args:
        to: What batch norms become: ``"sync_batch_norm"``, ``"batch_renorm"``, ``"ghost_batch_norm"``,
            ``"moving_average_batch_norm"`` or ``"frozen_batch_norm"`` while fitting; or for good ``"group_norm"``,
            ``"layer_norm"``, ``"instance_norm"`` or any other target of :func:`syncnorm.convert`.
        include: Globs on qualified names (``"backbone.*"``); only these are converted. Empty for all.
        exclude: Globs on qualified names; these are left. Stronger than ``include``.
        process_group: Ranks that share statistics: ``"world"``, ``"node"`` (those of one machine) or a number of ranks.
            None for all ranks that see different samples (under ModelParallel one rank of each tensor-parallel group),
            and for a layer that has a group of its own, that one.
        revert: Give the original classes back when the fit ends. Concerns the statistics family only.
        strict: Make a batch norm that cannot be converted an error instead of a warning.
        backend: Kernel backend by name, or ``"auto"``. Concerns the statistics family only.
        accumulate: Micro-batches per update of the running statistics, to go with ``accumulate_grad_batches``.
            Concerns ``"sync_batch_norm"`` only.
        num_groups: Groups of channels; 32 by default. Concerns ``"group_norm"`` and ``"evo_norm_s0"`` only.
        virtual_batch_size: Samples that share a statistic. Concerns ``"ghost_batch_norm"`` only, which needs it.
        r_max: Largest correction of the scale; 3 by default. Concerns ``"batch_renorm"`` only.
        d_max: Largest correction of the mean; 5 by default. Concerns ``"batch_renorm"`` only.
        options: Further options of the target by name, as :func:`syncnorm.convert` takes them, for example
            ``{"weight_standardization": True}`` for ``"group_norm"``.
        audit_every_n_steps: Compare the converted layers over ranks, bit for bit, whenever so many optimizer steps are done,
            and raise where they differ (:func:`syncnorm.audit`). None for never.
        watch: Whether ranks watch over each other's exchanges while fitting, and how many seconds they wait for one that
            lives and does not come; True for 300. One that has died is named at once (:func:`syncnorm.set_watch`). On CPU.

    Raises:
        ValueError: For an unknown ``to`` or a value out of range.
        TypeError: For an option that ``to`` does not take.

    Example:
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[SyncNorm()])  # doctest: +SKIP
    """

    def __init__(
        self,
        to: To = "sync_batch_norm",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        process_group: Literal["world", "node"] | int | None = None,
        revert: bool = True,
        strict: bool = False,
        backend: str = "auto",
        accumulate: int = 1,
        num_groups: int | None = None,
        virtual_batch_size: int | None = None,
        r_max: float | None = None,
        d_max: float | None = None,
        options: dict[str, bool | int | float | str] | None = None,
        audit_every_n_steps: int | None = None,
        watch: bool | float = False,
    ) -> None:
        super().__init__()
        if watch is not False and not watch > 0:
            raise ValueError(f"watch must be True, False or a number of seconds, got {watch}.")
        self.watch = watch
        self._watch_before: list[float | None] = []  # what was set when a fit began that has not ended
        if audit_every_n_steps is not None and audit_every_n_steps < 1:
            raise ValueError(f"audit_every_n_steps must be at least 1, or None for never; got {audit_every_n_steps}.")
        self.audit_every_n_steps, self._audited = audit_every_n_steps, 0
        self.revert = revert
        named: dict[str, Any] = {
            "process_group": process_group,
            "backend": None if backend == "auto" else backend,
            "accumulate": None if accumulate == 1 else accumulate,
            "num_groups": num_groups,
            "virtual_batch_size": virtual_batch_size,
            "r_max": r_max,
            "d_max": d_max,
        }
        given = {name: value for name, value in named.items() if value is not None}
        if twice := sorted({*given} & {*(options or {})}):
            raise ValueError(f"SyncNorm: {', '.join(twice)} is given by name and again in options. Give it once.")
        self._surgery = Surgery(to, include, exclude, strict, **given, **(options or {}))
        self._warned = False

    @property
    def state_key(self) -> str:
        """Apart for callbacks on different layers, the same for a run and its resumption."""
        patterns = {"include": self._surgery.include, "exclude": self._surgery.exclude}
        return self._generate_state_key(**patterns) if any(patterns.values()) else type(self).__qualname__

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        if self._surgery.keeps_keys and stage != "fit":
            return
        self._refuse_rivals(trainer, pl_module)
        if stage == "fit":
            refuse_workers(self._surgery, trainer, pl_module)
        refuse_copied(self._surgery, trainer, pl_module)
        self._surgery.default_group = _data_parallel_group(trainer)
        self._surgery.run(pl_module, last=False)
        if stage != "fit" and self._surgery.touched:
            rank_zero_info(f"SyncNorm: {self._surgery.summary()}")

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.watch:
            self._watch_before.append(patience())
            set_watch(_PATIENCE if self.watch is True else self.watch)
        self._refuse_rivals(trainer, pl_module)
        refuse_late(self._surgery, pl_module)
        refuse_copied(self._surgery, trainer, pl_module)
        self._surgery.run(pl_module, last=True)
        if self._surgery.found_nothing():
            self._warn_once("found no batch norm to convert, so it has no effect; see print(syncnorm.inspect(model)).")
            return
        rank_zero_info(f"SyncNorm: {self._surgery.summary()}")
        size, world = self._surgery.group_sizes()
        asked = self._surgery.options.get("process_group")
        if size == 1 < world and asked is not None:
            self._warn_once(
                f"has no effect: process_group={asked!r} gives each of the {world} ranks a group of its own. Use "
                "process_group='world'."
            )

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.audit_every_n_steps, trainer.global_step
        # Several optimizers count several steps a batch, and micro-batches none.
        if every is None or step // every == self._audited // every:
            return
        self._audited = step
        touched = {id(layer) for layer in self._surgery.touched}
        names = {name for layer in find_layers(pl_module) if id(layer.module) in touched for name in layer.short_names}
        if names:
            audit(pl_module, include=lambda name, _: name in names)

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._give_back()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """The arguments that decide what the weights mean, as plain data: ``{"version": 1, "spec": {...}}``."""
        return {"version": _VERSION, "spec": self._spec()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint fits: its weights would load into another norm without a word.

        Raises:
            SyncNormError: If it is of a run with another architecture, or of a later syncnorm.
        """
        if state_dict["version"] > _VERSION:
            raise SyncNormError(
                f"SyncNorm: the checkpoint has version {state_dict['version']} of its state, and this syncnorm knows "
                f"versions up to {_VERSION}. Install the syncnorm that wrote it, or a newer one."
            )
        theirs, ours = (_architecture(spec) for spec in (state_dict["spec"], self._spec()))
        if theirs != ours:
            raise SyncNormError(
                f"SyncNorm: the checkpoint is of a run with {theirs}, and this run has {ours}: its weights belong to "
                "another architecture. Use the same arguments, or start a new run from the weights alone (torch.load, "
                "model.load_state_dict) instead of ckpt_path."
            )

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        entry = checkpoint.setdefault("syncnorm", {"version": _VERSION, "specs": []})
        entry["specs"].append(self._spec())

    def _spec(self) -> dict[str, Any]:
        surgery = self._surgery
        return {"to": surgery.to, "include": surgery.include, "exclude": surgery.exclude, **surgery.options}

    def _refuse_rivals(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        others = [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, SyncNorm)]
        refuse_rivals(self._surgery, trainer, pl_module, [other._surgery for other in others if other is not self])

    def _give_back(self) -> None:
        if self.revert:
            self._surgery.undo()
        self._surgery.forget()
        if self._watch_before:
            with suppress(RuntimeError):  # the store may have gone with its rank, which is no news at the end
                set_watch(self._watch_before.pop())

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"SyncNorm {text}")


def _data_parallel_group(trainer: "Trainer") -> object:
    """The ranks with different samples, where tensor-parallel ranks have the same: those would count them twice."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is None or "tensor_parallel" not in (mesh.mesh_dim_names or ()) or mesh["tensor_parallel"].size() == 1:
        return None
    return mesh["data_parallel"]


def _architecture(spec: dict[str, Any]) -> str:
    to, own = spec["to"], []
    if not TARGETS[to].swaps:
        names = [name for name in TARGETS[to].options if name not in ("process_group", "backend")]
        own = [(name, spec.get(name, default_of(to, name)), default_of(to, name)) for name in names]
    chosen = [f"{name}={value}" for name, value, default in own if name == "num_groups" or value != default]
    return " and ".join([f"to={to!r}", *chosen])
