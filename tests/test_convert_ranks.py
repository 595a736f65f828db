"""Tier: gloo ranks. Converted models on real ranks: equal to the whole batch wherever they were converted, and back again."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import count_collectives, run_ranks

pytestmark = pytest.mark.gloo


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(54, 5),
        nn.BatchNorm1d(5, momentum=None),
    ).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randn(8, 5, generator=generator, dtype=torch.float64)


def two_steps(model: nn.Module, x: Tensor, weight: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        (scale * (model(x) * weight).sum()).backward()
        optimizer.step()
    return {name.removeprefix("module."): value.clone() for name, value in model.state_dict().items()}


def largest_error(mine: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    assert list(mine) == list(whole)
    return max(float((mine[name].double() - whole[name].double()).abs().max()) for name in whole)


def train_under_ddp(when: str) -> float:
    """Two steps on uneven shards, converted before or after DDP, against two steps of torch's layers on the whole batch."""
    (x, weight), model = data(), net()
    whole = two_steps(net(), x, weight)
    if when == "before":
        syncnorm.convert(model)
    wrapped = DistributedDataParallel(model)
    if when == "after":
        syncnorm.convert(wrapped, include=["1", "5"])  # names without DDP's prefix
    shard = slice(0, 5) if dist.get_rank() == 0 else slice(5, 8)
    # The loss is a sum over samples: DDP's mean over ranks is undone by the number of ranks.
    return largest_error(two_steps(wrapped, x[shard], weight[shard], dist.get_world_size()), whole)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp_on_shards_equals_the_whole_batch(when: str) -> None:
    assert max(run_ranks(train_under_ddp, 2, when)) < 1e-11


def test_the_same_test_sees_local_statistics() -> None:
    assert min(run_ranks(train_under_ddp, 2, "never")) > 1e-3


def keep_the_group_of_torchs_layer() -> None:
    mine = [dist.new_group([0, 1]), dist.new_group([2])][dist.get_rank() // 2]
    layer = nn.SyncBatchNorm(3, process_group=mine)
    model = nn.Sequential(layer)
    reason = syncnorm.plan(model).entries[0].reason
    members = [0, 1] if dist.get_rank() < 2 else [2]
    assert reason == f"group ranks {members}, as it had", reason
    syncnorm.convert(model)
    copy.deepcopy(model)  # which a layer with a live group could not stand
    x = torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10 * dist.get_rank()
    layer.double()(x)
    whole = torch.cat([torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10 * rank for rank in members])
    torch.testing.assert_close(layer.running_mean, 0.1 * whole.mean(0))
    syncnorm.revert(model)
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is mine

    syncnorm.convert(model, process_group="world")
    assert layer.process_group == "world"  # type: ignore[comparison-overlap]
    syncnorm.revert(model)
    assert layer.process_group is mine

    syncnorm.convert(model)
    dist.barrier()
    dist.destroy_process_group()
    syncnorm.revert(model)  # the group is gone, as after a run: still a way back
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is None


def test_torchs_sync_batch_norm_keeps_its_group() -> None:
    run_ranks(keep_the_group_of_torchs_layer, 3)


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(syncnorm.SyncNormError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def wrapped_models() -> dict[str, str]:
    """What is refused under a wrapper, and that nothing was changed then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def bare() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))

    def full() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP on a CPU
        cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {
            "ddp adds": (DistributedDataParallel(bare()), {"affine": True, "exclude": "2"}),
            "ddp drops": (DistributedDataParallel(full()), {"affine": False, "exclude": "2"}),
            "ddp without buffers": (DistributedDataParallel(full()), {}),
            "fsdp1": (FullyShardedDataParallel(full(), device_id=torch.device("cpu")), {}),
            "fsdp2": (fully_shard(full(), mesh=mesh), {}),
        }
    texts = {}
    for name, (model, options) in cases.items():
        types = [type(module) for module in model.modules()]
        for function in (syncnorm.plan, syncnorm.convert):
            texts[name] = refusal(function, model, "layer_norm", **options)
        assert [type(module) for module in model.modules()] == types

    texts["ddp freezes"] = refusal(syncnorm.convert, DistributedDataParallel(full()), "frozen_batch_norm", include="1")
    patient = DistributedDataParallel(full(), find_unused_parameters=True)
    syncnorm.convert(patient, "frozen_batch_norm", include="1")
    for _ in range(2):
        patient(torch.randn(2, 3, 4, 4)).sum().backward()

    allowed = DistributedDataParallel(full())
    syncnorm.convert(allowed, "layer_norm", include="1")
    allowed(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in allowed.parameters())
    for name in ("fsdp1", "fsdp2"):  # the class swap is for all
        syncnorm.convert(cases[name][0], strict=True)
        cases[name][0](torch.randn(2, 3, 4, 4))
        syncnorm.revert(cases[name][0])

    early = fully_shard(syncnorm.convert(full(), "layer_norm"), mesh=mesh)
    texts["revert"] = refusal(syncnorm.revert, early)
    return texts


def test_wrappers_that_have_taken_note_of_the_parameters() -> None:
    texts = run_ranks(wrapped_models, 2)[0]
    assert texts == {
        "ddp adds": "to='layer_norm' would add bias, weight to module.1, and DistributedDataParallel has taken note of the "
        "parameters there are. Convert before wrapping the model; nothing was changed.",
        "ddp drops": "to='layer_norm' would take bias, weight from module.1, and DistributedDataParallel has taken note of the "
        "parameters there are. Convert before wrapping the model; nothing was changed.",
        "ddp without buffers": "to='layer_norm' would leave no buffer in the model, and DistributedDataParallel has taken "
        "note that there are some. Convert before wrapping the model; nothing was changed.",
        "ddp freezes": "to='frozen_batch_norm' would take module.1 out of training, and DistributedDataParallel waits for the "
        "gradients of all parameters that it has taken note of. Convert before wrapping the model; nothing was changed.",
        "fsdp1": "to='layer_norm' puts other modules in place of _fsdp_wrapped_module.1, _fsdp_wrapped_module.2, and FSDP has "
        "sharded the model as it is. Convert before sharding; nothing was changed.",
        "fsdp2": "to='layer_norm' puts other modules in place of 1, 2, and FSDP has sharded the model as it is. Convert "
        "before sharding; nothing was changed.",
        "revert": "revert puts the original modules back in place of 1, 2, and FSDP has sharded the model as it is. Revert "
        "the unwrapped model; nothing was changed.",
    }


def disabled_and_without_update() -> None:
    (x, _), model = data(), syncnorm.convert(net())
    local = copy.deepcopy(syncnorm.revert(copy.deepcopy(model)))
    shard = x[:5] if dist.get_rank() == 0 else x[5:]
    with count_collectives() as counts, syncnorm.disabled(model):
        if dist.get_rank() == 0:  # one rank alone, and nobody waits
            torch.testing.assert_close(model(shard), local(shard), rtol=0, atol=0)
    assert sum(counts.values()) == 0, counts
    before = copy.deepcopy(model.state_dict())
    whole = net()(x)
    with syncnorm.no_stats_update(model):
        y = model(shard)
    torch.testing.assert_close(y, whole[:5] if dist.get_rank() == 0 else whole[5:], rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_contexts_on_ranks() -> None:
    run_ranks(disabled_and_without_update, 2)
