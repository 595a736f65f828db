"""Builds the native operators, once per torch version, processor and source, into a cache folder of the user.

Never at import: ``python -m syncnorm build`` or :func:`build` does it. The C++ compiler alone, no build tool: every ``.cpp``
of this folder is compiled, side by side, and all are linked into one library.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from syncnorm.errors import SyncNormError

__all__ = ["build", "compiler", "library_path"]

_FOLDER = Path(__file__).parent
_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]


def compiler() -> str | None:
    """The C++ compiler that :func:`build` would call: ``$CXX``, or the first of c++, g++, clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def library_path() -> Path:
    """Where the operators for this torch, this processor and these sources lie once built.

    Below ``$SYNCNORM_CACHE``, else ``$XDG_CACHE_HOME/syncnorm``, else ``~/.cache/syncnorm``.
    """
    base = (
        os.environ.get("SYNCNORM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "syncnorm"
    )
    key = hashlib.sha256(
        "\n".join([*(path.read_text() for path in _files("*.cpp", "*.h")), *_flags(), _processor()]).encode()
    ).hexdigest()[:12]
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    return Path(base) / f"torch-{torch.__version__}-{platform.machine()}-{capability}-{key}" / "syncnorm_native.so"


def build(*, force: bool = False, verbose: bool = False) -> Path:
    """Compile the operators if they are not there yet.

    Args:
        force: Compile even if they are.
        verbose: Print the command.

    Returns:
        The shared library.

    Raises:
        SyncNormError: If there is no compiler, or it fails; with its last lines.
    """
    target = library_path()
    if target.exists() and not force:
        return target
    cxx = compiler()
    if cxx is None:
        raise SyncNormError("the native backend needs a C++ compiler and none was found. Install g++ or set CXX.")
    target.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources, library = _files("*.cpp"), Path(folder) / target.name
        units = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [cxx, *_flags(), abi, *includes, "-c", str(source), "-o", str(unit)]
            for source, unit in zip(sources, units, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: _run(command, verbose), commands))
        # Linked without -fopenmp: the symbols are those of the OpenMP that torch has loaded, so that there is one pool.
        libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
        _run([cxx, "-shared", *map(str, units), "-o", str(library), *libraries], verbose)
        os.replace(library, target)  # atomic: ranks may build at the same time
    return target


def _files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in _FOLDER.glob(pattern))


def _flags() -> list[str]:
    if platform.machine() in ("aarch64", "arm64"):
        return [*_FLAGS, "-mcpu=native", "-DCPU_CAPABILITY_NEON"]
    # The vectors of at::vec are as wide as those of torch's own kernels, ATEN_CPU_CAPABILITY included.
    capability = torch.backends.cpu.get_cpu_capability()
    wide = [f"-DCPU_CAPABILITY_{capability}"] if capability in ("AVX2", "AVX512") else []
    return [*_FLAGS, "-march=native", *wide, *(["-mprefer-vector-width=512"] if capability == "AVX512" else [])]


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(" ".join(command), file=sys.stderr, flush=True)
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        lines = (outcome.stderr or outcome.stdout).strip().splitlines()
        shown = "\n".join([line for line in lines if "error" in line][-12:] or lines[-12:])
        raise SyncNormError(f"building the native backend failed (exit code {outcome.returncode}):\n{shown}")


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    keys = ("flags", "Features", "model name")
    return "\n".join(line for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if line.startswith(keys))
