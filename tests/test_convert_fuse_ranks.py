"""Tier: gloo ranks. A fused model over ranks is the whole batch, also where one rank runs the original code."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import count_collectives, run_ranks
from tests.test_convert_fuse import assert_same, images, made, resnet

pytestmark = pytest.mark.gloo


def step(model: nn.Module, x: Tensor, weight: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    (scale * (model(x) * weight).sum()).backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return found | {name.removeprefix("module."): buffer for name, buffer in model.named_buffers()}  # type: ignore[return-value]


def data() -> tuple[Tensor, Tensor]:
    return images(5, 3, 9, 9), torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def train(listening: int | None) -> None:
    """One step under DDP; the rank ``listening`` has hooks on a norm and on a ReLU, so that its code is the original. Without
    such a rank the model is converted after DDP has wrapped it.
    """
    x, weight = data()
    whole = step(made(resnet), x, weight)
    model = made(resnet) if listening is None else syncnorm.convert(made(resnet), fuse=True)
    wrapped = DistributedDataParallel(model)
    if listening is None:
        syncnorm.convert(wrapped, fuse=True)
    calls: list[int] = []
    if dist.get_rank() == listening:
        for module in (model[2].bn2, model[1].relu):  # type: ignore[index, union-attr]
            module.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, operator]
    shard = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)
    with count_collectives() as counts:
        found = step(wrapped, x[shard], weight[shard], dist.get_world_size())
    made_code = [module.forward._program for module in model.modules() if "forward" in vars(module)]  # type: ignore[attr-defined]
    assert sum(program.holds() for program in made_code) == (1 if dist.get_rank() == listening else 3)
    assert counts["all_reduce"] >= 2 * 6
    assert len(calls) == (3 if dist.get_rank() == listening else 0)
    assert_same(found, whole, 1e-11)


@pytest.mark.parametrize("listening", [None, 0])
def test_ranks_equal_the_whole_batch(listening: int | None) -> None:
    run_ranks(train, 2, listening)
