"""Which process a rank is, and whether it runs: by its number and when it started, as numbers are used again."""

import os
import socket
from pathlib import Path
from typing import Any

__all__ = ["host", "identity", "is_running", "look"]


def identity() -> dict[str, Any]:
    """This process, as others may look for it."""
    return {"pid": os.getpid(), "started": look(os.getpid())[1], "host": host()}


def is_running(record: dict[str, Any]) -> bool:
    """Whether the process of an :func:`identity` is seen to run here; never for one of another host or container."""
    if record.get("host") != host() or not isinstance(record.get("pid"), int):
        return False
    return look(record["pid"])[1] == record.get("started") != ""


def host() -> str:
    """This host, or container: its name, and the boot that it has been up since."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (f" {boot.read_text().strip()}" if boot.exists() else "")


def look(pid: int) -> tuple[str, str]:
    """State letter of a process and when it started; both empty if it is gone, dead but not yet buried included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return ("", "") if fields[0] in "ZX" else (fields[0], fields[19])
