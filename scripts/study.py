"""Which norm wins when: every claim about normalisation that small real data can test, measured on one core.

    python scripts/study.py run                 the whole study (configs/study.yaml), some 20 minutes on one core
    python scripts/study.py run --only non_iid  one experiment
    python scripts/study.py report              figures, the tables in docs/study.md, and whether the gates hold
    python scripts/study.py list                experiments, cells, and what is done

A run that was cut off goes on where it was. Results are CSV files in docs/study, figures PNGs in docs/images/study. Ends
with exit code 1 if a gate does not hold, 2 for a request that makes no sense.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sizes are small, and a cell's time should not depend on the cores
import torch
import yaml
from study_parts import store
from study_parts.store import Cell
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        cells = store.cells(load(args.config), args.only)
    except (OSError, ValueError, yaml.YAMLError) as problem:
        print(f"study.py: {args.config}: {problem}", file=sys.stderr)
        return 2
    if args.command == "list":
        return show(cells, args.out)
    if args.command == "run":
        return run(cells, args.out)
    from study_parts import report

    return report.write(args.out, args.figures, args.document)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report", "list"))
    parser.add_argument("--config", type=Path, default=ROOT / "configs/study.yaml", help="default configs/study.yaml")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="experiments (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/study", help="folder of the CSV files")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/images/study", help="folder of the PNG files")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/study.md", help="whose tables are filled in")
    return parser.parse_args(arguments)


def load(path: Path) -> dict[str, Any]:
    from syncnorm.lightning._config import load_config

    config = load_config(path.read_text())
    if not isinstance(config, dict):
        raise ValueError("a study's configuration is a mapping with 'seeds' and 'experiments'.")
    return config


def run(cells: list[Cell], out: Path) -> int:
    """Runs what is not there yet. The bar counts cells; its estimate is rough, as cells differ."""
    from study_parts.experiments import FUNCTIONS

    wanted = {cell.key for cell in cells}
    done = {key for name in {cell.experiment for cell in cells} for key in store.finished(out, name)}
    left = [cell for cell in cells if cell.key not in done]
    print(f"{len(cells)} cells, {len(cells) - len(left)} already there, {len(left)} to run", flush=True)
    unknown = sorted({cell.function for cell in left} - set(FUNCTIONS))
    if unknown:
        print(f"study.py: no function {unknown[0]!r}; there are {', '.join(FUNCTIONS)}.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tqdm(left, unit="cell", mininterval=1 if sys.stderr.isatty() else 30) as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell.experiment} {' '.join(map(str, cell.factors.values()))}"[:60], refresh=False)
            began = time.process_time()
            rows = FUNCTIONS[cell.function](cell.seeds, **cell.factors, **cell.options)
            seconds = round(time.process_time() - began, 2)
            store.add(out, cell, [row | {"cell_seconds": seconds} for row in rows], wanted)
    return 0


def show(cells: list[Cell], out: Path) -> int:
    for name in dict.fromkeys(cell.experiment for cell in cells):
        mine = [cell for cell in cells if cell.experiment == name]
        done = store.finished(out, name)
        print(f"{name:<20} {sum(cell.key in done for cell in mine):>3} of {len(mine):>3} cells done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
