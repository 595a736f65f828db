"""Tier: gloo ranks. The sum over symmetric memory without a GPU: its protocol in interpreted processes, its code for Hopper."""

import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.distributed import GroupSpec, resolve
from syncnorm.distributed.wire import set_exchange, sum_row
from syncnorm.distributed.wire.symmetric import Symmetric
from syncnorm.errors import SyncNormError, SyncNormMismatch, SyncNormTimeout
from syncnorm.testing import run_ranks

pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")


def _wire(folder: str, timeout: float = 60.0) -> Symmetric:
    """As symmetric.join makes it, over a file for each rank in place of a GPU's memory."""
    os.environ["TRITON_INTERPRET"] = "1"
    from syncnorm.kernels.triton import symmetric as kernel

    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.zeros(kernel.length(ranks), dtype=torch.int64).numpy().tofile(f"{folder}/{rank}")
    dist.barrier()
    size = kernel.length(ranks)
    memory = [torch.from_file(f"{folder}/{r}", shared=True, size=size, dtype=torch.int64) for r in range(ranks)]
    table = torch.tensor([m.data_ptr() for m in memory])  # another address in each process, as on GPUs
    return Symmetric(table, memory, rank, tuple(range(10, 10 + ranks)), timeout)


def _in_order(row: Tensor) -> Tensor:
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    total = rows[0] + rows[1]
    for other in rows[2:]:
        total = total + other
    return total


def _random_rows(folder: str, rounds: int) -> None:
    wire, generator = _wire(folder), torch.Generator().manual_seed(dist.get_rank())
    for number in range(rounds):
        size = [5, 1500, 0, 9000, 1, 1024][number % 6]  # blocks of 1024 words, pieces of 8192
        row = torch.randn(size, generator=generator, dtype=torch.float64)
        twin = row.clone()
        if number % 3 == dist.get_rank():
            time.sleep(0.02)
        assert torch.equal(wire.sum(row), _in_order(twin) if size else twin), number
        wire.settle()


@pytest.mark.gloo
@pytest.mark.parametrize(("ranks", "rounds"), [(2, 24), (3, 9)])
def test_rows_sum_in_the_order_of_the_ranks_to_the_same_bits(ranks: int, rounds: int, tmp_path: Any) -> None:
    run_ranks(_random_rows, ranks, str(tmp_path), rounds, timeout=90)


def _back_to_back(folder: str) -> None:
    wire = _wire(folder)  # nothing but the numbers keeps a fast rank from a slow one's slots
    for number in range(30):
        row = wire.sum(torch.full((3,), float(number + dist.get_rank()), dtype=torch.float64))
        if dist.get_rank() == number % 2:
            time.sleep(0.005)
        assert row.tolist() == [2.0 * number + 1.0] * 3, number


@pytest.mark.gloo
def test_two_slots_are_enough(tmp_path: Any) -> None:
    run_ranks(_back_to_back, 2, str(tmp_path), timeout=90)


def _absent(folder: str) -> str:
    wire = _wire(folder, timeout=1e-3)  # a thousand looks
    if dist.get_rank() == 1:
        time.sleep(0.1)
        dist.barrier()
        return ""
    row = wire.sum(torch.ones(3, dtype=torch.float64))
    assert row.isnan().all()  # a sum without a rank is nobody's
    dist.barrier()
    with pytest.raises(SyncNormTimeout) as caught:
        wire.sum(torch.ones(3, dtype=torch.float64))
    return str(caught.value)


@pytest.mark.gloo
def test_a_rank_that_does_not_come_is_named_at_the_next_row(tmp_path: Any) -> None:
    said = run_ranks(_absent, 2, str(tmp_path))[0]
    assert said.startswith("rank 11 did not come to an exchange within about 0.001 s. Found out later")


def _other_lengths(folder: str) -> str:
    wire = _wire(folder)
    row = wire.sum(torch.ones(3000 if dist.get_rank() else 5, dtype=torch.float64))
    assert row.isnan().all()
    with pytest.raises(SyncNormMismatch) as caught:
        wire.settle()
    return str(caught.value)


@pytest.mark.gloo
def test_rows_of_two_lengths_are_named_on_both_ranks(tmp_path: Any) -> None:
    for other, said in zip((11, 10), run_ranks(_other_lengths, 2, str(tmp_path)), strict=True):
        assert said.startswith(f"rank {other} brought a row of another length than this rank to an exchange.")


def _on_cpu() -> str:
    set_exchange("symmetric")
    with pytest.raises(SyncNormError) as caught:
        sum_row(torch.ones(3, dtype=torch.float64), resolve(GroupSpec()))
    return str(caught.value)


@pytest.mark.gloo
def test_rows_on_cpu_are_refused_by_name_on_all_ranks() -> None:
    first, second = run_ranks(_on_cpu, 2)
    assert first == second
    assert first.startswith(
        'the exchange "symmetric" was asked for by name and is impossible here: symmetric: rank 0: it '
    )
    assert "it serves rows on cuda, these are on cpu." in first


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_signals_release_and_acquire_for_the_whole_system(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from syncnorm.kernels.triton import symmetric as kernel

    launched: list[Any] = []
    kept, kernel.launch = kernel.launch, lambda *arguments, **constants: launched.append((arguments, constants))
    try:
        kernel.symmetric_sum(
            torch.ones(2050, dtype=torch.float64), *[torch.ones(8, dtype=torch.int64)] * 3, 1, 8, 2**40
        )
    finally:
        kernel.launch = kept
    ((function, programs, *arguments), constants) = (launched[0][0], launched[0][1])
    assert programs == 3
    kinds = {torch.float64: "*fp64", torch.int64: "*i64"}
    signature = {
        name: kinds[value.dtype] if isinstance(value, Tensor) else "i64" if value >= 2**31 else "i32"
        for name, value in zip(function.arg_names, arguments, strict=False)
    } | dict.fromkeys(constants, "constexpr")
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    binary = triton.compile(
        ASTSource(function, signature, places),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    ptx = binary.asm["ptx"]
    assert len(re.findall(r"atom\.global\.sys\.release\.exch\.b64", ptx)) == 8  # one for each rank, by one thread
    assert len(re.findall(r"ld\.global\.sys\.acquire\.b64|atom\.global\.sys\.acquire\.add", ptx)) >= 16
    assert ptx.index("bar.sync") < ptx.index("sys.release")  # what other threads have stored comes before
    assert "ld.volatile.global" in ptx and ".local" not in ptx
