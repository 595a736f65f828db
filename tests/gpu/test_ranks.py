"""Tier: gpu. Ranks with tensors on a device: NCCL, and several ranks that share one GPU over gloo."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm.distributed import GroupSpec, resolve
from syncnorm.distributed.collectives import all_reduce_sum
from syncnorm.distributed.wire import set_exchange, sum_row
from syncnorm.errors import SyncNormError
from syncnorm.testing import run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch
from tests.triton_cases import DEVICE, INTERPRETED

on_device = pytest.mark.skipif(INTERPRETED, reason="a CUDA device is needed, the interpreter will not do")
GPUS = torch.cuda.device_count()


def _step(splits: list[int], options: dict[str, Any], device: str, second_order: bool) -> dict[str, float]:
    """Errors of a step on this rank's part, on the device, against torch's layer on the whole batch, on CPU."""
    theirs = nn.BatchNorm2d(5, dtype=torch.float64)
    randomise_affine(theirs)
    mine = syncnorm.SyncBatchNorm2d(5, dtype=torch.float64, **options)
    mine.load_state_dict(theirs.state_dict())
    x, weight = whole_batch((sum(splits), 5, 6, 7))
    part = my_slice(splits)
    whole = results(theirs, x, weight, second_order=second_order)
    found = results(mine.to(device), x[part].to(device), weight[part].to(device), second_order=second_order)
    return errors({name: value.cpu() for name, value in found.items()}, whole, part)


def _over_gloo(splits: list[int], backend: str) -> dict[str, float]:
    return _step(splits, {"backend": backend}, DEVICE, True)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("splits", [[3, 5], [2, 0, 4, 1]], ids=str)
def test_ranks_that_share_a_device_over_gloo(splits: list[int], backend: str) -> None:
    for per_rank in run_ranks(_over_gloo, len(splits), splits, backend, timeout=45):
        assert not {name: error for name, error in per_rank.items() if error > 1e-12}


def _lent_memory() -> list[bool] | str:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # torch's own switch for tests
    torch.cuda.set_device(0)
    set_exchange("symmetric")
    group, right = resolve(GroupSpec()), []
    try:
        for n in (5, 3000, 9000):  # blocks of 1024 words, pieces of 8192
            row = torch.arange(n, dtype=torch.float64, device="cuda")
            right.append(torch.equal(sum_row(row * (dist.get_rank() + 1), group), row * 3))
    except SyncNormError as error:
        return str(error)
    row = torch.ones(7, dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_row(row, group)
    for _ in range(3):
        graph.replay()
    return [*right, row.tolist() == [8.0] * 7]


@on_device
def test_ranks_that_share_a_device_lend_each_other_memory() -> None:
    outcomes = run_ranks(_lent_memory, 2, timeout=45)
    if isinstance(outcomes[0], str):
        assert "a first sum" not in outcomes[0]
        pytest.skip(outcomes[0])
    assert outcomes == [[True] * 4] * 2


def _one_rank() -> tuple[list[float], list[float]]:
    torch.cuda.set_device(0)
    group = dist.new_group([0], backend="nccl")
    row = torch.arange(5, dtype=torch.float64, device="cuda")
    summed = all_reduce_sum(row.clone(), group.group_name).tolist()
    layer = syncnorm.SyncBatchNorm2d(3, process_group=group, backend="triton").cuda()
    y = layer(torch.randn(4, 3, 8, 8, device="cuda"))
    return summed, y.mean((0, 2, 3)).tolist()


@on_device
def test_one_rank_over_nccl() -> None:
    ((summed, means),) = run_ranks(_one_rank, 1, timeout=45)
    assert summed == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert max(map(abs, means)) < 1e-5


def _over_nccl(splits: list[int]) -> dict[str, float]:
    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl")
    return _step(splits, {"process_group": group}, "cuda", False)


@on_device
@pytest.mark.skipif(GPUS < 2, reason=f"NCCL over several ranks needs as many GPUs; here are {GPUS}")
def test_ranks_over_nccl() -> None:
    splits = [3, 5, 0, 2][: min(GPUS, 4)]
    for per_rank in run_ranks(_over_nccl, len(splits), splits, timeout=45):
        assert not {name: error for name, error in per_rank.items() if error > 1e-12}
