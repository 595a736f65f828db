"""``demo``: the main job on real data, handwritten digits, a few samples a rank."""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from syncnorm.cli._arguments import Count, Folder
from syncnorm.cli._files import atomic
from syncnorm.conversion._table import Report, Table

__all__ = ["demo"]

_EPOCHS, _SMALL_EPOCHS = 8, 2
_NUM_NORMS = 3  # batch norms in the network; each meets once forward and once backward
Run = dict[str, Any]  # one seed of one variant, as _demo_rank.py writes it


@dataclass(frozen=True)
class _Shown(Report):
    """What the demo found.

    Attributes:
        title: What was trained where.
        runs: By variant, one entry for each seed.
        files: What was written.
        shortfalls: What is missing from the expected picture, in sentences.
        notes: What could not be judged or drawn.
    """

    title: str
    runs: dict[str, list[Run]]
    files: tuple[str, ...]
    shortfalls: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.shortfalls

    def parts(self) -> list[str | Table]:
        header = ("", "test error (%)", "drift (σ)", "ms/step", "collectives per step")
        seeds = len(next(iter(self.runs.values())))
        over = f" and ± standard deviation over {seeds} seeds" if seeds > 1 else ""
        return [
            self.title, "", Table(header, [_cells(variant, runs) for variant, runs in self.runs.items()]), "",
            f"test error: of each rank's own copy on 797 images, mean over the ranks{over}",
            "drift: the largest gap between two ranks' running means, in running standard deviations of that channel",
            "collectives: of the norm layers + of DDP's gradient buckets, which every variant needs; counted by the profiler",
            *(f"note: {note}" for note in self.notes), f"wrote {' and '.join(self.files)}",
            *(f"NOT AS EXPECTED: {shortfall}" for shortfall in self.shortfalls),
        ]  # fmt: skip


def demo(
    *,
    ranks: Count = 2,
    batch_per_rank: Count = 2,
    epochs: Count | None = None,
    seeds: Count | None = None,
    out: Folder = Path("outputs"),
    small: bool = False,
) -> Report:
    """Train on handwritten digits with local batch norm, with syncnorm and with GroupNorm.

    The three differ in nothing but the norm layer; they are trained under torchrun, in less than a minute in all. Ends with a
    table, a CSV and a figure, and with status 1 if the expected picture did not appear.

    Args:
        ranks: Processes, at least 2.
        batch_per_rank: Samples of a process in a step, at least 2.
        epochs: Passes over the 1,000 images; 8 by default.
        seeds: Repetitions; 2 by default, and 1 on more than 2 ranks.
        out: Folder for demo.csv and demo.png, which are overwritten.
        small: 2 epochs and 1 seed: seconds, for CI.
    """
    from syncnorm.testing._digits import NUM_TRAIN_DIGITS, need_digits

    need_digits()
    epochs = epochs or (_SMALL_EPOCHS if small else _EPOCHS)
    seeds = seeds or (1 if small or ranks > 2 else 2)
    if ranks < 2:
        raise ValueError(f"--ranks must be at least 2, got {ranks}: a lone rank has nobody to share statistics with.")
    if batch_per_rank < 2:
        raise ValueError(f"--batch-per-rank must be at least 2, got {batch_per_rank}: local BN needs two values.")
    if ranks * batch_per_rank > NUM_TRAIN_DIGITS:
        raise ValueError(f"ranks × batch-per-rank must be at most {NUM_TRAIN_DIGITS}, got {ranks * batch_per_rank}.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is none.")
    title, began = _title(ranks, batch_per_rank, epochs, seeds), time.perf_counter()
    print(title, file=sys.stderr, flush=True)
    runs = _launch(ranks, batch_per_rank, epochs, seeds)
    notes = [f"{time.perf_counter() - began:.0f} s"]
    rows = _rows(runs, {"ranks": ranks, "batch_per_rank": batch_per_rank})
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "demo.csv"]
    with atomic(files[0]) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if find_spec("matplotlib"):
        from syncnorm.diagnostics._figures import demo_figure, save

        files.append(out / "demo.png")
        with atomic(files[1]) as unfinished:
            save(demo_figure(rows), unfinished)
    else:
        notes.append("no figure, which needs matplotlib: pip install syncnorm[plot]")
    if batch_per_rank != 2 or ranks not in (2, 4):
        notes.append("errors are only judged at 2 samples per rank on 2 or 4 ranks; judge these by eye")
    return _Shown(
        title, runs, tuple(map(str, files)), tuple(_shortfalls(runs, ranks, batch_per_rank, epochs)), tuple(notes)
    )


def _title(ranks: int, batch_per_rank: int, epochs: int, seeds: int) -> str:
    import torch

    where = f"NCCL, {ranks} GPUs" if torch.cuda.device_count() >= ranks else "gloo, CPU"
    what = f"{ranks} ranks ({where}) at {batch_per_rank} samples each"
    return f"Handwritten digits, MLP 64-128-128-128-10: {what}; {epochs} epochs, seeds: {seeds}"


def _launch(ranks: int, batch_per_rank: int, epochs: int, seeds: int) -> dict[str, list[Run]]:
    """Train all variants through torchrun: by variant, one entry for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "syncnorm.cli._demo_rank", str(epochs), str(batch_per_rank), str(seeds), str(result)]
        # The profiler that counts collectives is chatty below this level.
        environment = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"} | dict(os.environ)
        status = subprocess.run(command, env=environment, stdout=2).returncode
        if status != 0:
            raise SystemExit(
                f"syncnorm demo: training failed with exit code {status}; the first traceback above says why."
            )
        found: dict[str, list[Run]] = json.loads(result.read_text())
        return found


def _rows(results: dict[str, list[Run]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each variant, seed and epoch; the collectives are counted with the first seed."""
    import torch

    from syncnorm.cli._demo_rank import LR_AT_32

    lr = LR_AT_32 * settings["ranks"] * settings["batch_per_rank"] / 32
    return [
        {
            "variant": variant,
            "seed": run["seed"],
            "epoch": epoch,
            "test_error_percent": error,
            "drift_std": drift,
            "ms_per_step": run["ms_per_step"],
            "norm_collectives_per_step": runs[0]["norm_collectives"],
            "ddp_collectives_per_step": runs[0]["ddp_collectives"],
            **settings,
            "lr": lr,
            "torch": torch.__version__,
        }
        for variant, runs in results.items()
        for run in runs
        for epoch, (error, drift) in enumerate(zip(run["errors"], run["drifts"], strict=True), 1)
    ]


def _cells(variant: str, runs: list[Run]) -> tuple[str, ...]:
    errors, drift = _final_errors(runs), _largest_drift(runs)
    error = f"{fmean(errors):.2f}" + (f" ± {stdev(errors):.2f}" if len(errors) > 1 else "")
    shown = "no statistics" if drift is None else "0" if drift == 0 else f"{drift:.2f}"
    counts = f"{runs[0]['norm_collectives']:g} + {runs[0]['ddp_collectives']:g}"
    return variant, error, shown, f"{fmean(run['ms_per_step'] for run in runs):.1f}", counts


def _final_errors(runs: list[Run]) -> list[float]:
    return [run["errors"][-1] for run in runs]


def _largest_drift(runs: list[Run]) -> float | None:
    drifts = [run["drifts"][-1] for run in runs]
    return None if None in drifts else max(drifts)


def _shortfalls(results: dict[str, list[Run]], ranks: int, batch_per_rank: int, epochs: int) -> list[str]:
    """What is missing from the expected picture; errors are judged where the settings promise them."""
    local, sync = (fmean(_final_errors(results[variant])) for variant in ("local BN", "syncnorm"))
    found = []
    drift = _largest_drift(results["syncnorm"])
    if drift != 0:
        found.append(f"syncnorm's running means must be the same on all ranks; they drift by {drift} σ.")
    if not _largest_drift(results["local BN"]):
        found.append("local BN's running means must differ between ranks; they do not, so nothing measures the drift.")
    for variant, expected in (("local BN", 0), ("syncnorm", 2 * _NUM_NORMS), ("GroupNorm", 0)):
        counted = results[variant][0]["norm_collectives"]
        if counted != expected:
            found.append(f"{variant}'s norm layers must enter {expected} collectives per step, got {counted:g}.")
    if batch_per_rank != 2 or ranks not in (2, 4):
        return found
    if epochs < _EPOCHS:
        if local < 2 * sync:
            found.append(f"local BN's error must be at least twice syncnorm's; got {local:.2f} % and {sync:.2f} %.")
        return found
    limit = 5.0 if ranks == 2 else 3.5
    if local <= 20:
        found.append(f"local BN must collapse (test error above 20 %); got {local:.2f} %.")
    if sync >= limit:
        found.append(f"syncnorm's test error must be below {limit} % on {ranks} ranks; got {sync:.2f} %.")
    return found
