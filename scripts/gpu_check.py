"""Everything that only a GPU can show, in one command: tests, bandwidths, layers against their peers, models.

    python scripts/gpu_check.py --out gpu                 # within 8 minutes; needs torch, triton and this checkout
    python scripts/gpu_check.py --out gpu --parts kernels primitives
    python scripts/gpu_check.py --out gpu --dry           # runs every part in small on the CPU, to test this program

Writes OUT/report.json and OUT/report.md, and what each part printed. Parts run one after the other, the most telling first,
each in a process of its own with a time limit; a part that fails, or is cut off, leaves its rows and the others alone.
Without a CUDA device it says so and ends with 0.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from gpu_parts import targets

TOTAL = 470.0
BEGAN = time.monotonic()  # before torch is imported, which takes long on a machine that has just started

# Name, seconds it may take, and what it shows.
PARTS = {
    "kernels": (130, "The triton kernels against float64, every primitive, layout and dtype"),
    "primitives": (100, "Each primitive in GB/s, as a fraction of the copy bandwidth at the same size"),
    "training": (80, "Training steps: captured, compiled, without a host sync, the same bits twice, autocast, memory"),
    "layers": (110, "Whole layers, forward and backward, against their peers"),
    "ranks": (60, "Ranks: NCCL, and several that share a device over gloo"),
    "pair": (40, "A layer of two ranks that share a device, against nn.SyncBatchNorm"),
    "large": (40, "More than 2^31 elements"),
    "models": (80, "ResNet-50 and a segmentation head in training"),
    "tune": (400, "The numbers of a plan one at a time, against what they are"),
}
USUAL = [name for name in PARTS if name != "tune"]
TESTS = {
    "kernels": ["tests/gpu/test_kernels.py"],
    "training": ["tests/gpu/test_layers.py", "tests/gpu/test_norm_probe.py"],
    "ranks": ["tests/gpu/test_ranks.py"],
    "large": ["tests/gpu/test_large.py"],
}


def main() -> int:
    """0 unless a test failed or a part broke down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=USUAL, help="only these (tune by name only)")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU, interpreted: the numbers mean nothing")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)  # the process of one part
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()  # parts run from the root of the checkout
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        for row in rows(arguments.only, arguments.out, arguments.dry):
            with (arguments.out / f"{arguments.only}.jsonl").open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        return 0
    report: dict[str, Any] = {"environment": environment(), "dry": arguments.dry, "parts": {}}
    why_not = None if arguments.dry else missing()
    deadline = BEGAN + TOTAL
    for name in arguments.parts:
        if why_not is None:
            print(f"{name}: {PARTS[name][1]}", flush=True)
            result = part(name, arguments.out, min(PARTS[name][0], deadline - time.monotonic()), arguments.dry)
        else:
            result = {"status": "skipped", "reason": why_not, "seconds": 0.0, "rows": []}
        print(f"{name}: {result['status']}{', ' + result['reason'] if result['reason'] else ''}", flush=True)
        report["parts"][name] = result
        (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (arguments.out / "report.md").write_text(markdown(report))
    print(f"{arguments.out / 'report.md'} and report.json written")
    failed = any(row.get("outcome") in ("failed", "error") for p in report["parts"].values() for row in p["rows"])
    return int(failed or any(p["status"] == "failed" for p in report["parts"].values()))


def missing() -> str | None:
    """What a run needs and this machine has not."""
    import torch

    from syncnorm.kernels import triton

    if not torch.cuda.is_available():
        return "torch finds no CUDA device on this machine"
    try:
        return triton.objection(torch.empty(1, 1, device="cuda"))
    except RuntimeError as error:  # a driver too old, a device in use by others only
        return f"the CUDA device does not work: {str(error).splitlines()[0]}"


def part(name: str, out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Run one part in a process of its own and read what it left."""
    if seconds < 5:
        return {"status": "skipped", "reason": "the time was over", "seconds": 0.0, "rows": []}
    written, log = out / f"{name}.jsonl", out / f"{name}.log"
    written.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--only", name, *["--dry"] * dry]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # which may lead to peers
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    variables |= {"TRITON_INTERPRET": "1"} if dry else {}
    began, status, reason = time.monotonic(), "complete", ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, start_new_session=True
        )  # fmt: skip
        try:
            if process.wait(timeout=seconds):
                lines = log.read_text().strip().splitlines()
                status, reason = "failed", lines[-1][:300] if lines else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status, reason = "cut off", f"after {seconds:.0f} s, with the rows it had"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # what a part leaves behind would sit on the device beside the next
            process.wait()
    found = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    return {"status": status, "reason": reason, "seconds": round(time.monotonic() - began, 1), "rows": found}


def rows(name: str, out: Path, dry: bool) -> Iterator[dict[str, Any]]:
    """The rows of one part."""
    if name in TESTS:
        from gpu_parts import claims

        # Tests of tensors that fill the device come one after the other.
        return claims.run(TESTS[name], out, dry, workers=1 if name == "large" else 12)
    import importlib

    return importlib.import_module(f"gpu_parts.{name}").run("cpu" if dry else "cuda", dry)


def environment() -> dict[str, Any]:
    """Machine, versions and date."""
    import torch

    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }  # fmt: skip
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "devices": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory GB": round(properties.total_memory / 1e9), "L2 MB": round(properties.L2_cache_size / 1e6),
            "multiprocessors": properties.multi_processor_count,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }  # fmt: skip
    found["commit"] = _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    return found


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    facts = ", ".join(f"{key} {value}" for key, value in report["environment"].items() if value)
    lines = ["# On a GPU", "", f"{facts}.", "", "Made by `scripts/gpu_check.py`.", ""]
    if report["dry"]:
        lines += ["**A dry run on the CPU: the numbers mean nothing.**", ""]
    elif any(result["rows"] for result in report["parts"].values()):
        lines += ["## Targets", "", *targets.lines(report["parts"]), ""]
    for name, result in report["parts"].items():
        reason = f" ({result['reason']})" if result["reason"] else ""
        lines += [f"## {PARTS[name][1]}", "", f"{result['status']}{reason}, {result['seconds']} s.", ""]
        found = result["rows"]
        if name in TESTS and found:
            outcomes = [row["outcome"] for row in found]
            lines += [", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes))) + ".", ""]
            lines += [f"- {row['outcome']}: `{row['test']}`" for row in found if row["outcome"] in ("failed", "error")]
        elif found:
            lines += ["| " + " | ".join(found[0]) + " |", "|" + "---|" * len(found[0])]
            lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in found]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
