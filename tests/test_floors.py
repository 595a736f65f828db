"""Tier: no process. The map of the house: imports point down, and heavy libraries stay behind their doors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "syncnorm"

# Each floor may import those below it. What is not listed (errors, _version) lies under all of them.
FLOORS = {
    "core": set(),
    "kernels": {"core"},
    "distributed": {"core", "kernels"},
    "functional": {"core", "kernels", "distributed"},
    "modules": {"core", "kernels", "distributed", "functional"},
    "testing": {"core", "distributed"},
}
FLOORS["conversion"] = FLOORS["modules"] | {"modules"}
FLOORS["calibration"] = FLOORS["modules"] | {"modules"}
FLOORS["diagnostics"] = FLOORS["conversion"] | {"conversion", "calibration", "testing"}
FLOORS["lightning"] = FLOORS["diagnostics"] | {"diagnostics"}
FLOORS["cli"] = FLOORS["lightning"] | {"lightning"}

# Which floors may name which library.
HOMES = {
    "torch.distributed": {"distributed", "testing", "lightning", "cli"},
    "triton": {"kernels"},
    "lightning": {"lightning", "cli"},
    "pytorch_lightning": {"lightning", "cli"},
    "torchmetrics": {"diagnostics", "lightning"},
    "jsonargparse": {"lightning", "cli"},
    "sklearn": {"testing"},
    "matplotlib": {"diagnostics"},
    "rich": {"cli", "diagnostics"},
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "syncnorm" and len(parts) > 1 and parts[1] in FLOORS else None


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    mine = floor(".".join(["syncnorm", *path.relative_to(PACKAGE).with_suffix("").parts]))
    assert mine is not None, f"{path} is on no floor: add it to the map"
    up = {name for name in imports(path) if floor(name) not in {None, mine, *FLOORS[mine]}}
    assert not up, f"{path.name} on floor {mine} reaches up to {up}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_at_home(path: Path) -> None:
    mine = floor(".".join(["syncnorm", *path.relative_to(PACKAGE).with_suffix("").parts]))
    for library, homes in HOMES.items():
        used = {name for name in imports(path) if name == library or name.startswith(library + ".")}
        assert not used or mine in homes, f"{path} uses {used}"


def test_only_one_file_spells_collectives() -> None:
    spelled = {"all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "_resolve_process_group"}
    for path in MODULES:
        if floor(f"syncnorm.{path.relative_to(PACKAGE).parts[0]}") in {"testing", "lightning", "cli"}:
            continue
        calls = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, (ast.Name, ast.Attribute))
            and ast.unparse(node.func.value) in {"dist", "torch.distributed", "dist.distributed_c10d"}
        }  # fmt: skip
        assert path.name == "collectives.py" or not calls & spelled, path


def test_import_brings_torch_and_nothing_heavier() -> None:
    heavy = [
        "lightning",
        "pytorch_lightning",
        "torchmetrics",
        "triton",
        "torch._dynamo",
        "matplotlib",
        "rich",
        "sklearn",
        "jsonargparse",
    ]
    code = f"import sys, torch; old = set(sys.modules); import syncnorm; print(set({heavy}) & (set(sys.modules) - old))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout.strip() == "set()"
