"""Tier: gloo ranks. Two "nodes" on this machine, network namespaces with an address each: their groups, and a cut link.

Needs root and iproute2; elsewhere it skips, saying what was missing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gloo

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.177.0.1", "10.177.0.2")
INSIDE = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def two_networks() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that are joined by a pair of virtual interfaces, eth0 and eth1."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    if os.geteuid():
        pytest.skip("network namespaces need root")
    names = (f"syncnorm{os.getpid()}a", f"syncnorm{os.getpid()}b")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", names[1], "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", names[0])
            for node, name in enumerate(names):
                _ip("-n", name, "address", "add", f"{ADDRESSES[node]}/24", "dev", f"eth{node}")
                _ip("-n", name, "link", "set", f"eth{node}", "up")
            probe = ["ip", "netns", "exec", names[0], *INSIDE, "true"]
            subprocess.run(probe, check=True, capture_output=True, text=True, timeout=20)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def _start(names: tuple[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks on each node, with process numbers and a host name of their node's own."""
    for node, ranks in enumerate((["0", "1"], ["2", "3"])):
        command = ["ip", "netns", "exec", names[node], *INSIDE, sys.executable, "-m", "tests.faults.node_ranks"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"eth{node}"}
        with (folder / f"{node}.log").open("wb") as log:
            yield subprocess.Popen(
                [*command, f"node{node}", ADDRESSES[0], str(folder), "4", *ranks],
                cwd=ROOT, env=environment, stdout=log, stderr=log,
            )  # fmt: skip


def _await(folder: Path, ending: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while len(list(folder.glob(f"*.{ending}"))) < 4:
        if time.monotonic() > deadline:
            logs = {path.stem: path.read_text()[-2000:] for path in folder.glob("*.log")}
            pytest.fail(f"only {[p.name for p in folder.glob(f'*.{ending}')]} came within {seconds} s: {logs}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What each of four ranks saw, before and after the link between their nodes was cut."""
    folder = tmp_path_factory.mktemp("nodes")
    with two_networks() as names:
        running = list(_start(names, folder))
        try:
            _await(folder, "ready", 60)
            _ip("-n", names[1], "link", "set", "eth1", "down")
            (folder / "cut").touch()
            _await(folder, "json", 30)
            yield [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
        finally:
            for process in running:
                process.kill()
                process.wait(timeout=20)


def test_node_is_the_ranks_of_one_node(found: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(found):
        assert of_rank["members"] == ([0, 1] if rank < 2 else [2, 3])
        assert of_rank["node"] < 1e-12 and of_rank["world"] < 1e-12


def test_a_link_that_is_cut_is_named_on_both_sides(found: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(found):
        says = (
            "ranks [2, 3] do not answer: stopped, frozen or cut off"
            if rank < 2  # where the store is
            else "the store through which ranks hear of each other does not answer, and neither do ranks [0, 1]"
        )
        assert of_rank["kind"] == "SyncNormTimeout" and says in of_rank["text"], of_rank
        assert of_rank["seconds"] < 15, of_rank


def test_groups_within_a_node_outlive_a_cut_link(found: list[dict[str, Any]]) -> None:
    assert all(of_rank["alone"] < 1e-12 for of_rank in found)
