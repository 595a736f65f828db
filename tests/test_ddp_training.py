"""Tier: gloo ranks. A ResNet trained on two ranks, by DDP or FSDP, is the one trained in one process, step by step."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import run_ranks
from tests.oracles import my_slice

pytestmark = pytest.mark.gloo

# Rounding is 1e-16 per step, and twenty steps of SGD with momentum on a ReLU network amplify it by a few thousand.
BOUND = 1e-10
LOCAL = 1e-3  # what statistics of half the batch are off by, at least


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2), Block(8, 12, 2))
        self.head = nn.Linear(12, 4)
        self.spare = nn.Parameter(torch.zeros(1))  # moves all logits alike, so that a model without it learns the same

    def forward(self, x: Tensor, use_spare: bool = True) -> Tensor:
        y = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y + self.spare if use_spare else y


def _model(convert: bool) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet().double()
    return syncnorm.convert(model) if convert else model


def _batches(num_steps: int, num_samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        target = torch.randint(4, (num_samples,), generator=generator)
        noise = torch.randn(num_samples, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield noise + target.view(-1, 1, 1, 1) * 0.5, target


def _loss(forward: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(forward(x), target)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _state(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]


def _whole(num_steps: int, num_samples: int) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """One process on the whole batch: each step's data, and the parameters and buffers after it."""
    model = _model(convert=False)
    optimizer = _sgd(model.parameters())
    for x, target in _batches(num_steps, num_samples):
        optimizer.zero_grad()
        _loss(model, x, target).backward()
        optimizer.step()
        yield x, target, _state(model)


def _largest(mine: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(mine, exact, strict=True))


def _same_bits_everywhere(tensors: list[Tensor]) -> str:
    """A digest, which must be the same on all ranks."""
    digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, digest)
    assert set(others) == {digest}
    return digest


# ------------------------------------------------------------------------------------------------------ twenty steps of DDP


def _ddp(convert: bool, splits: list[int], num_steps: int, **options: Any) -> tuple[list[float], str]:
    model = _model(convert)
    wrapped = DistributedDataParallel(model, **options)
    optimizer = _sgd(wrapped.parameters())
    part, errors = my_slice(splits), []
    use_spare = not options.get("find_unused_parameters")  # else DDP has something to find
    for x, target, exact in _whole(num_steps, sum(splits)):
        optimizer.zero_grad()
        loss = _loss(lambda x: wrapped(x, use_spare), x[part], target[part])
        if len(set(splits)) > 1:
            loss = loss * syncnorm.loss_weight(len(x[part]))
        loss.backward()
        optimizer.step()
        errors.append(_largest(_state(model), exact))
    if not convert:
        return errors, ""
    return errors, _same_bits_everywhere([t.detach() for t in (*model.parameters(), *model.buffers())])


def test_twenty_steps_equal_one_process_at_every_step() -> None:
    first, second = (run_ranks(_ddp, 2, True, [4, 4], 20, broadcast_buffers=False, timeout=120) for _ in range(2))
    for errors, _ in first:
        assert len(errors) == 20 and max(errors) <= BOUND, errors
    assert first == second  # run to run, and (checked on the way) rank to rank: the same bits


def test_local_statistics_fail_the_same_test() -> None:
    for errors, _ in run_ranks(_ddp, 2, False, [4, 4], 20, timeout=120):
        assert max(errors) > LOCAL


def _every_option() -> dict[str, float]:
    options: list[dict[str, Any]] = [
        {}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 1e-4, "broadcast_buffers": False}, {"static_graph": True, "gradient_as_bucket_view": True},
    ]  # fmt: skip
    return {str(option): max(_ddp(True, [3, 3], 4, **option)[0]) for option in options}


class Branched(nn.Module):
    """A branch between two norms, which a rank may leave out; in DDP its bucket comes before that of the first norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.branch, self.norm2 = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, uses: Tensor) -> Tensor:
        branch = self.branch(x) * uses if uses.any() else 0.0
        return self.norm2(self.norm1(x * x) + branch)


def _left_out(num_steps: int) -> float:
    syncnorm.set_exchange("collective")  # over which a bucket can meet a row
    torch.manual_seed(0)
    whole = Branched().double()
    model = syncnorm.convert(copy.deepcopy(whole), process_group=dist.new_group())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1e-5)
    optimizers, worst = [_sgd(whole.parameters()), _sgd(model.parameters())], 0.0
    for step in range(num_steps):
        x = torch.randn(6, 4, dtype=torch.float64)
        uses = (torch.arange(6).view(6, 1) // 3 + step) % 2
        part = my_slice([3, 3])
        for forward, rows in ((whole, slice(0, 6)), (wrapped, part)):
            (forward(x[rows], uses[rows]).pow(3).sum() * 6 / len(x[rows])).backward()  # DDP averages
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        worst = max(worst, _largest(_state(model), _state(whole)))
    return worst


def test_a_branch_that_a_rank_leaves_out_where_layers_have_a_group_of_their_own() -> None:
    assert max(run_ranks(_left_out, 2, 4)) <= BOUND


def test_every_option_of_ddp() -> None:
    for errors in run_ranks(_every_option, 2, timeout=120):
        assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("splits", [[5, 2], [6, 0], [3, 0, 4]], ids=str)
def test_uneven_shards_with_loss_weight(splits: list[int]) -> None:
    for errors, _ in run_ranks(_ddp, len(splits), True, splits, 5, broadcast_buffers=False, timeout=120):
        assert max(errors) <= BOUND, errors


def _accumulation(splits: list[int]) -> float:
    whole, model = _model(convert=False), _model(convert=True)
    wrapped = DistributedDataParallel(model)
    optimizers, part, worst = [_sgd(whole.parameters()), _sgd(wrapped.parameters())], my_slice(splits), 0.0
    for x, target in _batches(3, 3 * sum(splits)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        micro_batches = list(zip(x.chunk(3), target.chunk(3), strict=True))
        for turn, (x, target) in enumerate(micro_batches):
            (_loss(whole, x, target) / 3).backward()
            with wrapped.no_sync() if turn < 2 else contextlib.nullcontext():
                (_loss(wrapped, x[part], target[part]) / 3).backward()
        for optimizer in optimizers:
            optimizer.step()
        worst = max(worst, _largest(_state(model), _state(whole)))
    return worst


def test_gradient_accumulation_without_sync() -> None:
    assert max(run_ranks(_accumulation, 2, [2, 2])) <= BOUND


# --------------------------------------------------------------------------------------------------------- mixed precision


def _autocast(convert: bool) -> tuple[float, float]:
    whole, model = _model(convert=False).float(), _model(convert).float()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    seen: list[torch.dtype] = []
    model.blocks[0].bn1.register_forward_hook(lambda _, args, y: seen.extend([args[0].dtype, y.dtype]))
    for x, target in _batches(1, 8):
        for forward, part in ((whole, slice(None)), (wrapped, my_slice([4, 4]))):
            with torch.autocast("cpu", torch.bfloat16):
                loss = _loss(forward, x[part].float(), target[part])
            loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
    if convert:
        _same_bits_everywhere(list(model.buffers()))
    statistics = [pair for pair in zip(model.buffers(), whole.buffers(), strict=True) if pair[0].dim()]
    names = [name for name, _ in model.named_parameters() if name != "spare"]  # its gradient is 0, and noise
    gradients = [(model.get_parameter(name).grad, whole.get_parameter(name).grad) for name in names]
    largest = [max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) for pairs in (statistics, gradients)]
    return largest[0], largest[1]


def test_autocast_differs_from_one_process_by_roundings_only() -> None:
    # Activations have 8 bits and are the same on both sides, but where a last bit of float32 in a statistic tips one over:
    # at most a rounding of 2^-9 per layer for all, and seven layers. Convolution gradients are rounded to 8 bits on each
    # rank, of a size up to twice their mean's, and once in the one process: three roundings of 2^-9 and of 2^-8.
    for statistics, gradients in run_ranks(_autocast, 2, True):
        assert statistics <= 7 * 2**-9 and gradients <= 2**-9 + 2 * 2**-8
    for statistics, gradients in run_ranks(_autocast, 2, False):
        assert statistics > 0.1 and gradients > 0.1


# ------------------------------------------------------------------------------------------------------------------- FSDP


def _fsdp1() -> float:
    model = _model(convert=True)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer, part, worst = _sgd(model.parameters()), my_slice([4, 4]), 0.0
    for x, target, exact in _whole(4, 8):
        optimizer.zero_grad()
        _loss(model, x[part], target[part]).backward()
        optimizer.step()
        with FullyShardedDataParallel.summon_full_params(model):
            worst = max(worst, _largest(_state(model), exact))
    return worst


def _fsdp2() -> float:
    mesh = init_device_mesh("cpu", (2,))
    model = _model(convert=True)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, part, worst = _sgd(model.parameters()), my_slice([4, 4]), 0.0
    for x, target, exact in _whole(4, 8):
        optimizer.zero_grad()
        _loss(model, x[part], target[part]).backward()
        optimizer.step()
        parameters = [p.full_tensor().detach() for p in model.parameters()]
        worst = max(worst, _largest([*parameters, *model.buffers()], exact))
    _same_bits_everywhere(list(model.buffers()))
    return worst


@pytest.mark.parametrize("train", [_fsdp1, _fsdp2])
def test_sharded_training_equals_one_process(train: Callable[[], float]) -> None:
    assert max(run_ranks(train, 2, timeout=120)) <= BOUND


# ---------------------------------------------------------------------------------------------------------------- going on


def _resume(splits: list[int]) -> float:
    """Half the steps on these ranks, the rest from its state dict, against one process for all of them."""
    part, errors = my_slice(splits), []
    model = _model(convert=True)
    wrapped, optimizer = DistributedDataParallel(model), _sgd(model.parameters())
    for step, (x, target, exact) in enumerate(_whole(6, sum(splits))):
        if step == 3:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = _model(convert=False)
            model.load_state_dict(state[0], strict=True)
            syncnorm.convert(model)
            wrapped, optimizer = DistributedDataParallel(model), _sgd(model.parameters())
            optimizer.load_state_dict(state[1])
        optimizer.zero_grad()
        _loss(wrapped, x[part], target[part]).backward()
        optimizer.step()
        errors.append(_largest(_state(model), exact))
    return max(errors)


def test_training_goes_on_from_a_checkpoint() -> None:
    assert max(run_ranks(_resume, 2, [4, 4])) <= BOUND
