"""``convert-ckpt``: a file is read without running any of it, its norms are translated, and another file takes its place."""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from syncnorm.cli._arguments import Globs
from syncnorm.cli._files import atomic, refuse_existing
from syncnorm.conversion import ConvertedLayer, To, convert_state_dict
from syncnorm.conversion._layers import display
from syncnorm.conversion._state_dict import NoNormsError
from syncnorm.conversion._table import Report, Table
from syncnorm.conversion._targets import STATISTICS_FAMILIES, TARGETS

__all__ = ["convert_ckpt"]

_To: TypeAlias = Literal["batch_norm"] | To
_WEIGHTS = ".safetensors"
_STATISTICS = {"running_mean", "running_var"}


@dataclass(frozen=True)
class _Converted(Report):
    """What became of a checkpoint.

    Attributes:
        source: File that was read.
        target: File that was written.
        to: The norm.
        layers: By the place of a state dict in the file (empty for the file itself), its layers.
        notes: What else changed, and what is left to do.
    """

    source: str
    target: str
    to: str
    layers: dict[str, tuple[ConvertedLayer, ...]]
    notes: list[str] = field(default_factory=list)

    def parts(self) -> list[str | Table]:
        changed = []
        for place, layers in self.layers.items():
            for layer in layers:
                if layer.new or layer.dropped:
                    entries = (", ".join(names) for names in (layer.kept, layer.new, layer.dropped))
                    changed.append((place, display(layer.name), str(layer.channels), *entries))
        where = ", ".join(filter(None, self.layers))
        total = sum(map(len, self.layers.values()))
        head = f"{self.target}: {total} norms as {self.to}, {len(changed)} with other entries" + (
            f" in {where}" if where else ""
        )
        header = ("in", "layer", "channels", "kept", "new", "dropped")
        first = 0 if len(self.layers) > 1 else 1
        table = Table(header[first:], [row[first:] for row in changed])
        return [head, *([table] if changed else []), *(f"note: {note}" for note in self.notes)]


def convert_ckpt(
    source: Path,
    target: Path,
    *,
    to: _To,
    include: Globs = (),
    exclude: Globs = (),
    force: bool = False,
) -> Report:
    """Translate a checkpoint to another norm.

    Reads safetensors, and what torch.save wrote, the latter with weights_only=True: a file that would run code is refused.
    Every state dict in it is translated (a Lightning checkpoint's, averaged copies); all else is kept. The model is not
    needed: a layer with running_mean and running_var is a batch norm, also torch's SyncBatchNorm and the whole family of
    syncnorm's, which have the same entries. An instance norm that tracks statistics looks the same; --exclude it. Group,
    layer and instance norms are all a weight and a bias; to make batch norms of them, name them with --include. Their
    statistics are new, so call syncnorm.recalibrate before evaluating.

    Args:
        source: Checkpoint to read.
        target: File to write; a name in .safetensors takes the tensors of the state dict alone. It is there whole or not at
            all.
        to: The norm to translate to, batch_norm being torch's.
        include: Only these layers, by their names in the checkpoint, where * matches dots too.
        exclude: Leave these layers; stronger than --include.
        force: Overwrite the target.
    """
    refuse_existing(target, force)
    content, metadata = _read(source)
    places = {place: state for place, state in _state_dicts(content).items() if state}
    if not places:
        raise ValueError(f"{source} holds no state dict: no mapping of names to tensors, at its top or one below.")
    converted: dict[str, tuple[ConvertedLayer, ...]] = {}
    without: list[NoNormsError] = []
    for place, state in places.items():
        try:
            new, converted[place] = convert_state_dict(state, to, include=include, exclude=exclude)
        except NoNormsError as error:
            without.append(error)
            continue
        except ValueError as error:
            raise ValueError(f"{source}{f', {place}' if place else ''}: {error}") from error
        content = {**content, place: new} if place else new
    if not converted:
        raise ValueError(f"{source}: {without[0]}")
    report = _Converted(str(source), str(target), to, converted, _forget_run(content, to))
    report.notes.extend(_advice(to, [layer for layers in converted.values() for layer in layers], content))
    if target.suffix == _WEIGHTS:
        content = _weights_alone(content, next(iter(converted)), report.notes)
    _write(target, content, metadata)
    return report


def _read(path: Path) -> tuple[Any, dict[str, str] | None]:
    """Content of the file, and the metadata of safetensors."""
    import torch

    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is no sound safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True), None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle that makes {_unsafe(path)}, which can run any code, so it is not loaded. Where you trust it, "
            "load it and save what is plain: torch.save(model.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, KeyError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is nothing that torch.save or safetensors wrote, or it is cut short.") from error


def _unsafe(path: Path) -> str:
    import torch

    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip, as before torch 1.6
        names = []
    return ", ".join(names[:3]) or "objects of unknown classes"


def _state_dicts(content: Any) -> dict[str, Any]:
    """Mappings of names to tensors, by their place: the content itself, or entries of it."""
    if not isinstance(content, Mapping):
        return {}
    if _holds_tensors(content):
        return {"": content}
    return {place: value for place, value in content.items() if isinstance(place, str) and _holds_tensors(value)}


def _holds_tensors(value: Any) -> bool:
    import torch

    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


def _forget_run(content: Any, to: str) -> list[str]:
    """Take out what SyncNorm noted of another norm: it would refuse to resume."""
    if not isinstance(content, Mapping):
        return []
    record = cast("dict[str, Any]", content).get("syncnorm")
    specs = record.get("specs", []) if isinstance(record, Mapping) else []
    others = sorted({str(spec.get("to")) for spec in specs if isinstance(spec, Mapping)} - {to})
    if not others:
        return []
    del cast("dict[str, Any]", content)["syncnorm"]
    callbacks = content.get("callbacks")
    if isinstance(callbacks, Mapping):
        kept = {key: state for key, state in callbacks.items() if not str(key).startswith("SyncNorm")}
        cast("dict[str, Any]", content)["callbacks"] = kept
    return [
        f"the record of SyncNorm(to={', '.join(map(repr, others))}) was taken out, which would refuse to resume this"
    ]


def _advice(to: str, layers: list[ConvertedLayer], content: Any) -> list[str]:
    notes = []
    if not any(layer.new or layer.dropped for layer in layers):
        notes.append("torch's BatchNorm and SyncBatchNorm and syncnorm's family of it have the same entries: a copy")
    fresh = [layer for layer in layers if _STATISTICS & {*layer.new}]
    if fresh:
        notes.append(
            f"{len(fresh)} layers have the statistics of a new one, mean 0 and variance 1: call syncnorm.recalibrate(model, "
            "batches) before you evaluate"
        )
    if to not in STATISTICS_FAMILIES and to != "batch_norm":
        notes.append("the model computes something else with another norm: train on, or measure it, before you use it")
        target = TARGETS[to]
        if "num_groups" in target.options:
            notes.append(
                f"num_groups is no part of a checkpoint: syncnorm.convert(model, to={to!r}, num_groups=...) decides it"
            )
        if target.activates:
            notes.append("the norm is an activation too: remove the one that follows it from the model")
    parameters = any({*layer.new, *layer.dropped} - _STATISTICS - {"num_batches_tracked"} for layer in layers)
    if parameters and isinstance(content, Mapping) and content.get("optimizer_states"):
        notes.append("optimizer_states are of the old parameters and fit the new model no more: load the weights alone")
    return notes


def _weights_alone(content: Any, place: str, notes: list[str]) -> dict[str, Any]:
    """What safetensors can hold: tensors by name, each in memory of its own."""
    import torch

    state = content[place] if place else content
    others = [name for name in content if name != place] if place else []
    strangers = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise ValueError(f"safetensors holds tensors only, and {strangers[0]!r} is none. Name the target .ckpt or .pt.")
    if others:
        notes.append(f"safetensors holds the tensors of {place!r} alone; left out: {', '.join(map(str, others))}")
    seen: set[int] = set()
    weights = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone() if storage in seen and storage else tensor.contiguous()
        seen.add(storage)
    return weights


def _write(path: Path, content: Any, metadata: dict[str, str] | None) -> None:
    with atomic(path) as unfinished:
        if path.suffix == _WEIGHTS:
            from safetensors.torch import save_file

            save_file(content, unfinished, metadata or {"format": "pt"})
        else:
            import torch

            torch.save(content, unfinished)
