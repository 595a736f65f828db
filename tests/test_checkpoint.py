"""Tier: gloo ranks. Activation checkpointing: statistics count a batch once, and a recompute meets nobody a second time.

The oracle is torch's own layer on the whole batch in one process, without a checkpoint.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointFunction,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import syncnorm
from syncnorm.functional import _checkpoint
from syncnorm.kernels import objections
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import count_exchanges, my_slice

pytestmark = pytest.mark.gloo

# Float64, up to three layers of 5 values per channel, a cube: a few hundred roundings of 1e-16 on values up to about 10.
BOUND = 1e-12

Checkpoint = Callable[[Callable[..., Tensor], Tensor], Tensor]


class Net(nn.Module):
    """Three norms and a linear map; ``walk`` says how they are called and what is checkpointed."""

    def __init__(self, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.a, self.b, self.c = (make_norm() for _ in range(3))
        for parameter in self.parameters():
            parameter.data = torch.randn_like(parameter.data)


class Rerun(torch.autograd.Function):
    """Somebody's own checkpoint: the forward keeps only its input, the backward calls the layer again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(grad)
        return x.grad, None


class Slope(torch.autograd.Function):
    """As Rerun, for the gradient of the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.layer(x), x, grad)[0], None


def _rerun(x: Tensor, layer: nn.Module, ck: Checkpoint) -> Tensor:
    return layer(x) if ck is _plain else Rerun.apply(x, layer)


def _hidden(x: Tensor, net: Net) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        h = net.a(x)
    return net.a(net.linear(h))


def _penalty(x: Tensor, net: Net) -> Tensor:
    h = net.a(x)
    (slope,) = torch.autograd.grad(net.b(h).tanh().sum(), h, create_graph=True)
    return slope * h


def _slope(x: Tensor, net: Net, ck: Checkpoint) -> Tensor:
    h = net.a(x)
    y = net.a(net.linear(h)) if ck is _plain else Slope.apply(net.linear(h), net.a)
    (slope,) = torch.autograd.grad(y.tanh().sum(), h, retain_graph=True)
    return net.a(slope * h)  # a call after the one made in backward, which must not take its place


# How the layers are called, how often in all, and whether no recompute needs another exchange.
WALKS: dict[str, tuple[Callable[[Net, Tensor, Checkpoint], Tensor], int, bool]] = {
    "one layer": (lambda n, x, ck: ck(n.a, x), 1, True),
    "one layer twice in a region": (lambda n, x, ck: ck(lambda x: n.a(n.linear(n.a(x)).sigmoid()), x), 2, True),
    "three layers": (lambda n, x, ck: ck(lambda x: n.c(n.linear(n.b(n.linear(n.a(x)).tanh()))), x), 3, True),
    "a layer that ends no region": (lambda n, x, ck: ck(lambda x: n.linear(n.a(x)).exp(), x), 1, True),
    "two regions": (lambda n, x, ck: ck(lambda x: n.linear(n.b(x)), ck(lambda x: n.linear(n.a(x)), x)), 2, True),
    "one layer in two regions": (lambda n, x, ck: ck(n.a, n.linear(ck(n.a, x))), 2, True),
    "inside and outside": (lambda n, x, ck: n.a(n.linear(ck(n.a, x))), 2, True),
    "no norm in the region": (lambda n, x, ck: n.a(ck(n.linear, x)), 1, True),
    "nested regions": (lambda n, x, ck: ck(lambda x: n.b(ck(lambda x: n.linear(n.a(x)), x)), x), 2, False),
    "own function in a region": (lambda n, x, ck: ck(lambda x: _rerun(n.linear(n.a(x)), n.a, ck), x), 2, False),
    "user's hooks inside a region": (lambda n, x, ck: ck(lambda x: _hidden(x, n), x), 2, False),
}


def _reentrant(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(fn, x, use_reentrant=True)


def _frames(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(fn, x, use_reentrant=False)


def _plain(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
    return fn(x)


MODES: dict[str, tuple[Checkpoint, bool]] = {
    "reentrant": (_reentrant, True),
    "not reentrant": (_frames, True),
    "not reentrant, no early stop": (_frames, False),
}


def _data(num_samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, num_samples, 3, generator=generator, dtype=torch.float64).unbind(0)
    return x * 2 + 1, weight


def _step(
    net: Net, x: Tensor, weight: Tensor, walk: Callable[..., Tensor], ck: Checkpoint, backwards: int = 1
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    loss = (walk(net, x, ck).pow(3) * weight).sum()
    for turn in range(backwards):
        loss.backward(retain_graph=turn < backwards - 1)
    grads = {f"sum:{name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    return {"dx": x.grad, **grads, **{name: b.clone() for name, b in net.named_buffers()}}


def _ours(**options: Any) -> Net:
    return Net(lambda: syncnorm.SyncBatchNorm1d(3, dtype=torch.float64, **options))


def _torchs() -> Net:
    return Net(lambda: nn.BatchNorm1d(3, dtype=torch.float64))


def _errors(mine: dict[str, Tensor], whole: dict[str, Tensor], part: slice) -> float:
    worst = 0.0
    for name, exact in whole.items():
        value = mine[name].clone()
        if name == "dx":
            exact = exact[part]
        elif name.startswith("sum:") and dist.is_initialized():
            dist.all_reduce(value)
        if exact.numel():
            worst = max(worst, float((value - exact).abs().max() / whole[name].abs().max().clamp(min=1)))
    return worst


def _every_walk(splits: list[int], **options: Any) -> list[str]:
    failures = []
    x, weight = _data(sum(splits))
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    for name, (walk, calls, reuses) in WALKS.items():
        for backwards in (1, 2):
            whole = _step(_torchs(), x, weight, walk, _plain, backwards)
            with count_collectives() as unchecked:
                _step(_ours(**options), x[part], weight[part], walk, _plain, backwards)
            for mode, (ck, early_stop) in MODES.items():
                if backwards == 2 and name == "own function in a region":
                    continue  # its backward accumulates into parameters of its own accord
                with set_checkpoint_early_stop(early_stop), count_collectives() as checked:
                    mine = _step(_ours(**options), x[part], weight[part], walk, ck, backwards)
                error = _errors(mine, whole, part)
                case = f"{name}, {mode}, {backwards} backwards"
                if not error <= BOUND:
                    failures.append(f"{case}: off by {error:.1e}")
                expected = unchecked.get("all_reduce", 0)
                if dist.is_initialized():
                    assert expected == calls * (1 + backwards)
                if checked.get("all_reduce", 0) < expected or (reuses and checked != unchecked):
                    failures.append(f"{case}: {checked} exchanges, {unchecked} without a checkpoint")
    return failures


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_one_process_counts_once_and_has_the_same_gradients(backend: str) -> None:
    failures = _every_walk([5], backend=backend)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("splits", [[3, 2], [4, 0]], ids=str)
def test_ranks_count_once_exchange_no_more_and_equal_the_whole_batch(splits: list[int]) -> None:
    for failures in run_ranks(_every_walk, 2, splits):
        assert not failures, "\n".join(failures)


def _backward_in_a_region(splits: list[int]) -> list[float]:
    x, weight = _data(sum(splits))
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    walks: list[Callable[[Net, Tensor, Checkpoint], Tensor]] = [
        lambda n, x, ck: ck(lambda x: _penalty(x, n), x),
        lambda n, x, ck: ck(lambda x: _slope(x, n, ck), x),
    ]
    errors = []
    for walk in walks:
        whole = _step(_torchs(), x, weight, walk, _plain)
        for backend in ("auto", "aten"):
            mine = _step(_ours(backend=backend), x[part], weight[part], walk, _frames)
            errors.append(_errors(mine, whole, part))
    return errors


def test_a_region_may_run_a_backward_of_its_own() -> None:
    assert max(_backward_in_a_region([5])) <= BOUND
    assert max(map(max, run_ranks(_backward_in_a_region, 2, [3, 2]))) <= BOUND


# ------------------------------------------------------------------------------------------------ what surrounds a region


def _own_function(splits: list[int]) -> tuple[float, dict[str, int]]:
    x, weight = _data(sum(splits))
    part = my_slice(splits) if dist.is_initialized() else slice(None)
    whole = _step(_torchs(), x, weight, lambda n, x, ck: n.a(x), _plain)
    with count_collectives() as counts:
        mine = _step(_ours(), x[part], weight[part], lambda n, x, ck: Rerun.apply(x, n.a), _plain)
    return _errors(mine, whole, part), counts


def test_a_layer_called_in_somebodys_backward_exchanges_and_counts_nothing() -> None:
    error, _ = _own_function([5])
    assert error <= BOUND
    for error, counts in run_ranks(_own_function, 2, [3, 2]):
        assert error <= BOUND and counts == {"all_reduce": 3}  # forward, forward again, backward


def _surroundings(splits: list[int]) -> dict[str, float]:
    x, weight = _data(sum(splits))
    part = my_slice(splits)
    out = {}
    for mode, (ck, _) in MODES.items():
        walk = WALKS["three layers"][0]
        whole = _torchs()
        _step(whole, x * 3, weight, walk, _plain)
        whole.zero_grad()
        exact = _step(whole, x, weight, walk, _plain)

        net = _ours()  # a forward whose backward never comes
        walk(net, (x * 3)[part].requires_grad_(), ck)
        out[f"{mode}: forward only"] = _errors(_step(net, x[part], weight[part], walk, ck), exact, part)

        net = _ours()  # two forwards before the backward of either
        first = walk(net, (x * 3)[part].requires_grad_(), ck)
        second_input = x[part].clone().requires_grad_()
        second = walk(net, second_input, ck)
        (second.pow(3) * weight[part]).sum().backward()
        mine = {"dx": second_input.grad, **{f"sum:{n}": p.grad.clone() for n, p in net.named_parameters()}}
        out[f"{mode}: two forwards"] = _errors(mine, {name: exact[name] for name in mine}, part)
        first.sum().backward()

        # Hooks around a region are not the region's own.
        around = contextlib.ExitStack()
        with around:
            around.enter_context(save_on_cpu())
            net = _ours()
            walk(net, (x * 3)[part].requires_grad_(), ck)
            out[f"{mode}: hooks around"] = _errors(_step(net, x[part], weight[part], walk, ck), exact, part)
    return out


def test_regions_do_not_disturb_each_other() -> None:
    for per_rank in run_ranks(_surroundings, 2, [3, 2]):
        assert max(per_rank.values()) <= BOUND, per_rank


def _look() -> tuple[int, dict[str, int], bool]:
    layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    y = _frames(lambda x: layer(x).exp(), x)
    before = layer.running_mean.clone()
    with count_collectives() as counts:
        for _ in range(2 if dist.get_rank() == 0 else 0):
            assert torch.equal(y.grad_fn._saved_result, y)  # recomputes, outside of any backward
    unchanged = torch.equal(layer.running_mean, before)
    y.sum().backward()
    return int(layer.num_batches_tracked), counts, unchanged


def test_looking_at_a_saved_tensor_on_one_rank_waits_for_nobody() -> None:
    assert run_ranks(_look, 2) == [(1, {}, True)] * 2


def _selective(saved: list[Any] | None) -> tuple[float, dict[str, int]]:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved is None or op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(fn, x, use_reentrant=False, context_fn=contexts)

    def walk(net: Net, x: Tensor, ck: Checkpoint) -> Tensor:
        # Operations that the layer needs, too: torch pairs them by their number.
        return ck(lambda x: (net.b(net.linear(net.a(x * 1.5))) * x + x).sigmoid() * torch.cat([x, x])[: len(x)], x)

    x, weight = _data(5)
    part = my_slice([3, 2]) if dist.is_initialized() else slice(None)
    whole = _step(_torchs(), x, weight, walk, _plain)
    with count_collectives() as counts:
        mine = _step(_ours(), x[part], weight[part], walk, selective)
    return _errors(mine, whole, part), counts


def _every_selection() -> list[tuple[float, dict[str, int]]]:
    aten = torch.ops.aten
    return [_selective(saved) for saved in (None, [], [aten.mul.Tensor], [aten.addmm.default, aten.cat.default])]


def test_selective_checkpointing_pairs_the_right_operations() -> None:
    assert max(error for error, _ in _every_selection()) <= BOUND
    for per_rank in run_ranks(_every_selection, 2):
        for error, counts in per_rank:
            assert error <= BOUND and counts == {"all_reduce": 4}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    "backend", [name for name, reason in objections(torch.empty(2, 3, 4)).items() if reason is None]
)
def test_selective_checkpointing_of_a_fused_layer_alone(backend: str, saved: bool) -> None:
    policy = CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_args, **_kwargs: policy)
    layer = syncnorm.SyncBatchNorm1d(3, activation="relu", backend=backend).double()
    x, residual = torch.randn(2, 6, 3, 40, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (layer, functools.partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)):
        layer.reset_running_stats()
        leaves = [x, residual, layer.weight, layer.bias]
        gradients.append(torch.autograd.grad(run(x, residual).square().sum(), leaves))
        assert layer.num_batches_tracked == 1
    torch.testing.assert_close(gradients[0], gradients[1])


# --------------------------------------------------------------------------------------------------------- torch.compile


def _checkpoint_in_compile() -> dict[str, Any]:
    x, weight = _data(5)
    part = my_slice([3, 2]) if dist.is_initialized() else slice(None)
    exchanges: list[int] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        exchanges.append(count_exchanges(graph.graph))
        return make_boxed_func(graph.forward)

    out: dict[str, Any] = {}
    for mode, ck in (("reentrant", _reentrant), ("not reentrant", _frames)):
        exchanges.clear()
        torch._dynamo.reset()
        net = _ours()
        walk = WALKS["three layers"][0]
        backend = aot_autograd(  # as aot_eager, with a look at the graphs
            fw_compiler=record, partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True
        )
        compiled = torch.compile(functools.partial(walk, ck=ck), fullgraph=True, backend=backend)
        whole = _step(_torchs(), x, weight, walk, _plain)
        mine = _step(net, x[part], weight[part], lambda n, x, _, compiled=compiled: compiled(n, x), _plain)
        out[mode] = _errors(mine, whole, part), list(exchanges)
    return out


def test_a_checkpoint_inside_a_compiled_step() -> None:
    for error, _ in _checkpoint_in_compile().values():
        assert error <= BOUND
    for per_rank in run_ranks(_checkpoint_in_compile, 2):
        for error, exchanges in per_rank.values():
            # The compiled recompute is part of the backward graph and makes its exchanges again, alike on all ranks; torch
            # 2.11 keeps those of the forward.
            assert error <= BOUND and exchanges in ([3, 6], [3, 3]), exchanges


def _compiled_in_checkpoint() -> tuple[float, int]:
    x, weight = _data(5)
    part = my_slice([3, 2]) if dist.is_initialized() else slice(None)
    torch._dynamo.reset()
    net = _ours()
    walk = lambda n, x, ck: ck(n.a, x)  # noqa: E731
    whole = _step(_torchs(), x, weight, walk, _plain)
    net.a.compile(fullgraph=True, backend="aot_eager")
    mine = _step(net, x[part], weight[part], walk, _frames)
    mine = {
        name: value for name, value in mine.items() if not name.startswith("a.running") and "num_batches" not in name
    }
    return _errors(mine, {name: whole[name] for name in mine}, part), int(net.a.num_batches_tracked)


def test_a_compiled_layer_inside_an_eager_checkpoint_counts_each_run_as_torchs_own_does() -> None:
    # A limit, and torch's too: compiled code cannot tell its recompute. Gradients are right; the statistics move twice
    # towards the same batch. Put the checkpoint inside torch.compile instead.
    for error, updates in [_compiled_in_checkpoint(), *run_ranks(_compiled_in_checkpoint, 2)]:
        assert error <= BOUND and updates == 2


# ---------------------------------------------------------------------------------------------------------------- canary


def test_the_private_hooks_of_torch_are_still_there() -> None:
    seen: list[tuple[set[str], bool, Any]] = []

    def region(x: Tensor) -> Tensor:
        seen.append((set(_checkpoint._hook()), _checkpoint.is_recomputing(), _checkpoint._reentrant_region()))
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    _frames(region, x).sum().backward()
    assert "frame" in seen[0][0] and not seen[0][1]
    assert {"target_frame_ref", "gid"} <= seen[1][0] and seen[1][1]
    seen.clear()
    y = _reentrant(region, x)
    y.sum().backward()
    assert [recomputing for _, recomputing, _ in seen] == [False, True]
    assert seen[0][2] is seen[1][2] and isinstance(seen[0][2], CheckpointFunction | torch.autograd.function.FunctionCtx)
    assert not _checkpoint._hook() and _checkpoint._reentrant_region() is None
    with save_on_cpu():
        assert not _checkpoint._hook()  # somebody else's
