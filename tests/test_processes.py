"""Tier: no process. A process is found by its number and start, whatever it is called and from wherever it is seen."""

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from syncnorm.distributed import processes
from syncnorm.distributed.wire.handshake import own_objection

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self").exists(), reason="needs Linux")

_PR_SET_NAME, _CLONE_NEWPID, _CLONE_NEWNS, _MS_PRIVATE = 15, 0x20000000, 0x00020000, 0x4000 | 1 << 18


def _in_a_fork(function: Callable[[], object]) -> str:
    """What ``function`` gives, or raises, in a process of its own that is still there when this one looks."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(function())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.mark.parametrize("name", ["обучение".encode()[:15], b"\xff)( 7 Z"])  # the first ends in half a letter
def test_a_process_is_found_by_any_name(name: bytes) -> None:
    def named() -> bool:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)
        return processes.is_running(processes.identity())

    assert _in_a_fork(named) == "True"


def test_a_process_in_a_namespace_that_sees_its_hosts_processes_is_found_from_there() -> None:
    def in_a_namespace() -> str:
        if ctypes.CDLL(None).unshare(_CLONE_NEWPID):
            return "not allowed"
        return _in_a_fork(lambda: f"{os.getpid()} {processes.identity()['pid']} {os.readlink('/proc/self')}")

    said = _in_a_fork(in_a_namespace)
    if said == "not allowed":
        pytest.skip("this user may not make namespaces")
    own, number, seen = said.split()
    assert own == "1" and number == seen != own


def test_a_process_that_has_ended_is_told_from_one_of_a_container_of_the_same_name() -> None:
    libc = ctypes.CDLL(None)

    def in_a_container() -> str:
        if libc.unshare(_CLONE_NEWPID | _CLONE_NEWNS):
            return "not allowed"

        def inside() -> str:
            if libc.mount(None, b"/", None, _MS_PRIVATE, None) or libc.mount(b"proc", b"/proc", b"proc", 0, None):
                return "not allowed"
            return json.dumps(processes.identity())

        return _in_a_fork(inside)

    ended = json.loads(_in_a_fork(lambda: json.dumps(processes.identity())))
    assert processes.has_ended(ended) and not processes.has_ended(processes.identity())
    said = _in_a_fork(in_a_container)
    if said == "not allowed":
        pytest.skip("this user may not make namespaces")
    record = json.loads(said)
    assert record["pid"] == 1 and record["host"] == processes.host()
    assert not processes.has_ended(record) and not processes.is_running(record)


def test_a_boot_id_that_may_not_be_read_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(f"[Errno 13] Permission denied: {path}")

    monkeypatch.setattr(Path, "read_text", read_text)
    assert processes.host() and own_objection("auto", "cpu") == "this system has no boot id to tell hosts apart."
