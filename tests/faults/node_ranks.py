"""The ranks of one "node", for test_nodes: processes in a network, a host name and process numbers of the node's own."""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import syncnorm
from syncnorm.distributed import group_spec, resolve
from syncnorm.distributed.collectives import group_ranks
from tests.faults.network import outcome

SAMPLES = 3
PATIENCE = 3.0


def batches() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(dist.get_world_size(), SAMPLES, 4, generator=generator, dtype=torch.float64)


def error(layer: torch.nn.Module, ranks: list[int]) -> float:
    """How far the layer is from torch's own on the batches of these ranks."""
    x = batches()
    exact = torch.nn.BatchNorm1d(4).double()(x[ranks].flatten(0, 1)).view(len(ranks), SAMPLES, 4)
    return float((layer(x[dist.get_rank()]) - exact[ranks.index(dist.get_rank())]).detach().abs().max())


def run(folder: Path) -> dict[str, Any]:
    """Over the ranks of the node and over all of them; and the same after the link between the nodes has been cut."""
    syncnorm.set_watch(PATIENCE)
    rank, everyone = dist.get_rank(), list(range(dist.get_world_size()))
    node, world = (syncnorm.SyncBatchNorm1d(4, process_group=which, dtype=torch.float64) for which in ("node", "world"))
    members = list(group_ranks(resolve(group_spec("node")).name))
    found: dict[str, Any] = {"members": members, "node": error(node, members), "world": error(world, everyone)}
    (folder / f"{rank}.ready").touch()
    while not (folder / "cut").exists():
        time.sleep(0.02)
    kind, text, seconds = outcome(lambda: world(batches()[rank]))
    return {**found, "kind": kind, "text": text, "seconds": seconds, "alone": error(node, members)}


def main() -> None:
    host, address, folder, world, *ranks = sys.argv[1:]
    socket.sethostname(host)  # of this namespace
    torch.set_num_threads(1)
    children = []
    for rank in map(int, ranks):
        if pid := os.fork():
            children.append(pid)
            continue
        where, limit = f"tcp://{address}:29511", timedelta(seconds=40)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=int(world), timeout=limit)
        found = json.dumps(run(Path(folder)))
        Path(folder, f"{rank}.partial").write_text(found)
        Path(folder, f"{rank}.partial").rename(Path(folder, f"{rank}.json"))
        time.sleep(PATIENCE)  # whose end the others would notice before the cut
        os._exit(0)  # the groups wait for ranks that are cut off
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
