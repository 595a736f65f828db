"""Which process a rank is, and whether it runs: by its number and when it started, as numbers are used again."""

import os
import socket
from pathlib import Path
from typing import Any

from syncnorm.errors import SyncNormError

__all__ = ["boot_id", "has_ended", "host", "identity", "is_running", "look", "number", "refuse_fork"]


def identity() -> dict[str, Any]:
    """This process, as others may look for it."""
    return {"pid": number(), "started": look(number())[1], "host": host(), "namespace": namespace()}


def is_running(record: dict[str, Any]) -> bool:
    """Whether the process of an :func:`identity` is seen to run here; never for one of another host or container."""
    if record.get("host") != host() or not isinstance(record.get("pid"), int):
        return False
    return look(record["pid"])[1] == record.get("started") != ""


def has_ended(record: dict[str, Any]) -> bool:
    """Whether the process of an :func:`identity` is seen to have ended; never for one whose number means nothing here."""
    # Containers may share the name of their host, and its boot; their processes do not see each other.
    here = record.get("host") == host() and record.get("namespace") == namespace() != ""
    return here and not is_running(record)


def namespace() -> str:
    """Whose process numbers ``/proc`` shows: this process' own namespace, or one so many above; empty where it is not told."""
    try:
        lines = Path("/proc/self/status").read_bytes().splitlines()
        numbers = next(line for line in lines if line.startswith(b"NSpid:")).split()[1:]
        return f"{os.readlink('/proc/self/ns/pid')} {len(numbers)}"
    except (OSError, StopIteration):
        return ""


def host() -> str:
    """This host, or container: its name, and the boot that it has been up since."""
    return f"{socket.gethostname()} {boot_id()}".rstrip()


def boot_id() -> str:
    """The boot that this host has been up since; empty where the system does not say, or not to us."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def number() -> int:
    """The number of this process in ``/proc``, where others look for it: its own, but for a namespace that sees its host's."""
    try:
        return int(os.readlink("/proc/self"))
    except OSError:
        return os.getpid()


def refuse_fork(pid: int, rank: int) -> None:
    """Raise in a fork of process ``pid``: it has the connections of the rank, and none of the threads that serve them."""
    if os.getpid() != pid:
        raise SyncNormError(
            f"process {os.getpid()} is a fork of process {pid}, which is rank {rank}, and has no part in its process group. "
            "Start processes of ranks with spawn or forkserver; in a worker of a DataLoader use layers in eval mode."
        )


def look(pid: int) -> tuple[str, str]:
    """State letter of a process and when it started; both empty if it is gone, dead but not yet buried included."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # the name in it is any bytes, cut after the fifteenth
    except OSError:
        return "", ""
    fields = stat.rpartition(b")")[2].decode().split()
    return ("", "") if fields[0] in "ZX" else (fields[0], fields[19])
