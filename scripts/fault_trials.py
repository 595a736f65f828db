"""Random faults in random places, and what becomes of the other ranks: named, unnamed, aborted, silently wrong, hung.

    python scripts/fault_trials.py --trials 200 --seed 1                   # ours, and the same without our check
    python scripts/fault_trials.py --trials 20 --contenders watch          # one of them
    python scripts/fault_trials.py --trials 200 --write docs/benchmarks/faults

A trial is three training steps of a network of four norms on 2 to 4 processes over gloo's loopback; one fault strikes one
rank at one layer and step. Ends with 1 if a watched run has an abort, a hang, a silently wrong result, a false alarm, or
names fewer than 98 % on all live ranks.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from fault_trials_rank import ENDING, LAYERS, STEPS, WIDTHS, Spec, run

import syncnorm
from syncnorm.distributed.wire import shm
from syncnorm.testing import RankError, run_ranks

FAULTS = (
    "skip", "extra", "swap", "eval", "no_grad", "channels", "dtype", "bad_input", "backward_order", "no_backward", "raise",
    "exit", "kill", "stop", "stuck",
)  # fmt: skip
BENIGN = ("none", "slow", "empty", "nan")
CHANGING = (
    "empty",
    "nan",
)  # the event itself changes the results of all, so that there is nothing to compare them with
WAITING = ("stop", "stuck")
CONTENDERS = {
    "watch": "syncnorm, watch",
    "shm": "syncnorm, shared memory",
    "off": 'syncnorm, `set_check("off")`',
    "textbook": "textbook",
}
CLASSES = (
    "named on all live ranks", "named on some", "unnamed error", "abort of a healthy rank", "silently wrong", "hang",
    "completed, and right",
)  # fmt: skip
EXPECTED = ("completed, and right", "completed")  # where there was no fault
PATIENCE = 3.0
GROUP_TIMEOUT = 6.0
TOLERANCE = 1e-3  # of float32 results of size 1: rounding is 1e-6, two layers mixed up 1


def draw(number: int, seed: int, faults: tuple[str, ...]) -> Spec:
    """The ``number``-th trial of a seed."""
    chance = random.Random(f"{seed}/{number}")
    world = chance.choice([2, 3, 4])
    fault = chance.choice(faults)
    return Spec(
        fault,
        # two layers that can be swapped, one of which comes first
        layer=chance.choice([name for name in LAYERS if fault != "swap" or name != "norm3"]),
        # a backward that is put off needs one after it, a layer that is left out a later exchange to be noticed at
        step=chance.randrange(STEPS - 1),
        victim=chance.randrange(world),
        world=world,
        seed=chance.randrange(2**31),
        patience=PATIENCE,
    )


def trial(spec: Spec, contender: str) -> dict[str, Any]:
    """Run one trial and say what it came to."""
    with tempfile.TemporaryDirectory(prefix="syncnorm-trial-") as name:
        folder = Path(name)
        died: dict[int, str] = {}
        # Where all ranks live, none is lost; to say that one is keeps them from a last meeting.
        lost = [spec.victim if spec.fault in ENDING else spec.world]
        try:
            run_ranks(run, spec.world, spec, contender, folder, lost=lost, timeout=45, group_timeout=GROUP_TIMEOUT)
        except RankError as error:
            died = error.errors
        live = [r for r in range(spec.world) if r != spec.victim or spec.fault not in ENDING]
        files = {r: folder / f"{r}.json" for r in live}
        told = {r: json.loads(file.read_text()) for r, file in files.items() if file.exists()}
        struck = folder / "struck"
        at = float(struck.read_text()) if struck.exists() else None
    errors = [t for t in told.values() if t["kind"] != "completed"]
    seconds = max((t["at"] - at for t in errors), default=None) if at is not None else None
    result = classify(spec, live, told, died)
    return {**asdict(spec), "class": result, "seconds": seconds, "ranks": told, "died": died}


def classify(spec: Spec, live: list[int], told: dict[int, Any], died: dict[int, str]) -> str:
    ends = [
        int(found[1]) for r in live if r not in told and (found := re.search(r"exit code (-?\d+)", died.get(r, "")))
    ]
    if any(end < 0 and end != -signal.SIGKILL for end in ends):
        return "abort of a healthy rank"
    if any(r not in told for r in live):
        return "hang" if -signal.SIGKILL in ends else "unnamed error"  # killed when the time was up
    kinds = [told[r]["kind"] for r in live]
    if "the fault did not happen" in kinds:
        raise RuntimeError(f"{spec}: {[t['text'] for t in told.values()]}")
    if all(told[r]["named"] for r in live):
        return "named on all live ranks"
    if any(told[r]["named"] for r in live):
        return "named on some"
    if any(kind != "completed" for kind in kinds):
        return "unnamed error"
    if spec.fault in CHANGING:
        return "completed"
    return "completed, and right" if all(told[r]["error"] < TOLERANCE for r in live) else "silently wrong"


def series(contender: str, trials: int, seed: int) -> list[dict[str, Any]]:
    """``trials`` faults, and a fifth as many events that are no fault."""
    results = []
    specs = [draw(number, seed, FAULTS) for number in range(trials)]
    specs += [draw(number, seed + 1_000_003, BENIGN) for number in range(-(-trials // 5))]
    start = time.monotonic()
    for number, spec in enumerate(specs):
        results.append(trial(spec, contender))
        _progress(contender, number + 1, len(specs), start, results)
    return results


def _progress(contender: str, done: int, total: int, start: float, results: list[dict[str, Any]]) -> None:
    filled = 24 * done // total
    left = (time.monotonic() - start) * (total - done) / done
    counts = Counter(result["class"] for result in results)
    shown = ", ".join(f"{counts[name]} {name}" for name in (*CLASSES, "completed") if counts[name])
    line = f"{contender} [{'█' * filled}{'·' * (24 - filled)}] {done}/{total}, {left:.0f} s left: {shown}"
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:150]}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % max(total // 10, 1) == 0:
        print(line, file=sys.stderr, flush=True)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    faults = [r for r in results if r["fault"] in FAULTS]
    benign = [r for r in results if r["fault"] in BENIGN]
    counts = Counter(r["class"] for r in faults)

    def seconds(kinds: tuple[str, ...]) -> dict[str, float] | None:
        found = [
            r["seconds"] for r in faults if r["fault"] in kinds and r["seconds"] is not None and "named" in r["class"]
        ]
        return {"median": statistics.median(found), "largest": max(found), "trials": len(found)} if found else None

    return {
        "faults": len(faults),
        **{name: counts[name] for name in CLASSES},
        "no fault": len(benign),
        "false alarms": sum(r["class"] not in EXPECTED for r in benign),
        "seconds": {
            "mismatch": seconds(tuple(f for f in FAULTS if f not in ENDING)),
            "rank gone": seconds(("kill", "exit", "raise")),
            "rank frozen or stuck": seconds(WAITING),
        },
    }


def passes(summary: dict[str, Any]) -> bool:
    bad = ("abort of a healthy rank", "silently wrong", "hang", "false alarms")
    return not any(summary[name] for name in bad) and summary["named on all live ranks"] >= 0.98 * summary["faults"]


def table(summaries: dict[str, dict[str, Any]]) -> str:
    columns = ("faults", *CLASSES, "no fault", "false alarms")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for contender, summary in summaries.items():
        cells = [str(summary[name]) for name in columns]
        lines.append(f"| {CONTENDERS[contender]} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| seconds from the fault to the last rank's named error | median | largest | trials |",
        "|---|---|---|---|",
    ]
    for contender, summary in summaries.items():
        for what, found in summary["seconds"].items():
            if found:
                times = f"{found['median']:.2f} | {found['largest']:.2f} | {found['trials']}"
                lines.append(f"| {contender}: {what} | {times} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="faults per contender (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--write", type=Path, help="write PATH.json and PATH.md")
    options = parser.parse_args()
    if "shm" in options.contenders and (reason := shm.objection()):
        print(f"without shared memory: {reason}", file=sys.stderr)
        options.contenders.remove("shm")
    results = {name: series(name, options.trials, options.seed) for name in options.contenders}
    summaries = {name: summarise(found) for name, found in results.items()}
    print(table(summaries))
    for name, found in results.items():
        for r in found:
            if name in ("watch", "shm") and r["fault"] in FAULTS and r["class"] != "named on all live ranks":
                told = {rank: (t["kind"], t["text"][:160]) for rank, t in r["ranks"].items()}
                where = f"{r['fault']} {r['layer']} step {r['step']} rank {r['victim']} of {r['world']}"
                print(f"{name}: {where}: {r['class']} {told}")
    if options.write:
        write(options, summaries, results)
    return 0 if "watch" not in summaries or passes(summaries["watch"]) else 1


def write(options: argparse.Namespace, summaries: dict[str, Any], results: dict[str, Any]) -> None:
    load = Path("/proc/loadavg")
    where = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads of torch, {cores()} cores",
        "load": load.read_text().split()[:3] if load.exists() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "syncnorm": syncnorm.__version__,
        "command": f"python scripts/fault_trials.py --trials {options.trials} --seed {options.seed}",
    }
    slim = {
        name: [
            {key: r[key] for key in ("fault", "layer", "step", "victim", "world", "class", "seconds")} for r in found
        ]
        for name, found in results.items()
    }
    options.write.parent.mkdir(parents=True, exist_ok=True)
    data = {"where": where, "summaries": summaries, "trials": slim}
    options.write.with_suffix(".json").write_text(json.dumps(data) + "\n")
    options.write.with_suffix(".md").write_text(document(where, summaries))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def document(where: dict[str, Any], summaries: dict[str, Any]) -> str:
    parts = _text(where, summaries).split("\n\n")
    wide = [part if part.startswith(("|", "    ", "- ", "#")) else textwrap.fill(part, 128) for part in parts]
    return "\n\n".join(wide)


def _text(where: dict[str, Any], summaries: dict[str, Any]) -> str:
    return f"""# Fault trials

Random faults in random places, and what became of the ranks that were left. Written by

    {where["command"]} --write docs/benchmarks/faults

on {where["date"]}: {where["machine"]}, load {where["load"]}, Python {where["python"]}, torch {where["torch"]}, syncnorm
{where["syncnorm"]}. All ranks are processes of one machine, over gloo's loopback; more ranks than cores, and other work beside
them where the load says so, which the seconds below contain. Nothing of this has run on NCCL.

A trial is {STEPS} training steps of a network of {len(LAYERS)} norms of {sorted(set(WIDTHS))} channels on 2 to 4 ranks. One
fault ({", ".join(f"`{f}`" for f in FAULTS)}; see `syncnorm.testing.inject`) strikes one rank at one layer and step. *Named*: an
error of ours that says which rank it was and in which layer. *A healthy rank*: any whose process the fault does not itself
end. *Silently wrong*: all ranks that are left complete, and one has outputs, gradients or buffers that differ from those of
one process. *Completed, and right*: other dtypes on the wire, which then do no harm. *No fault*: nothing, a slow rank, an
empty batch, a NaN; an error there would be a false alarm.

{table(summaries)}

What is compared with what:

- **watch**: as it is meant to be run where faults matter. A rank that is stopped or stuck is named after {PATIENCE:g} s, as
  was asked for.
- **shared memory**: without the watch, on one machine. A rank that does not come is named at the time limit of the process
  group, here {GROUP_TIMEOUT:g} s in place of half an hour.
- **`set_check("off")`**: the same layers and collectives without our check: what a correct implementation without it does.
- **textbook**: the collectives and arithmetic of torch's `SyncBatchNorm`, written in torch operators for this table, as the
  class refuses to run on CPU. The time limit of the process group is {GROUP_TIMEOUT:g} s here, too; by default these ranks
  would wait for half an hour, and then raise the same unnamed error.
"""


if __name__ == "__main__":
    sys.exit(main())
