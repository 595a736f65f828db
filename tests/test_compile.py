"""Tier: gloo ranks. A compiled training step is the whole batch's: one graph, one exchange per direction, few recompiles."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import run_ranks
from tests.oracles import count_exchanges, my_slice, step_errors, torchs

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.timeout(300),  # Inductor calls a C++ compiler, on some machines for the first time
]

# Compiled code sums the same 10 to 60 values per channel in another order, in float64: a few 1e-15 of the largest value.
BOUND = 1e-12


def _compiled(layer: nn.Module, backend: Any = "aot_eager", **options: Any) -> nn.Module:
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend=backend, **options)
    return layer


def _group(name: str) -> Any:
    if name == "ProcessGroup":
        return dist.new_group([0, 1])
    if name == "DeviceMesh":
        return init_device_mesh("cpu", (2,))
    if name == "named dim":
        return init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["dp"]
    return name


# Options of the layer, and the split of each step over the ranks. Sizes 0 and 1 are special to torch.compile.
OVER_RANKS: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "default": ({}, [[4, 4]] * 3),
    "cumulative average": ({"momentum": None}, [[4, 4]] * 3),
    "uneven, other sizes each step": ({}, [[3, 5], [4, 2], [7, 6], [2, 9]]),
    "empty shards": ({}, [[3, 0], [0, 4], [2, 3]]),
    "empty shards, no statistics": ({"track_running_stats": False}, [[3, 0]]),
    "one value per rank": ({"spatial": ()}, [[1, 1], [1, 1]]),
    "no affine": ({"affine": False}, [[4, 3]]),
    "no bias": ({"bias": False}, [[4, 3]]),
    "named backend": ({"backend": "reference"}, [[4, 3]]),
    "ProcessGroup": ({"process_group": "ProcessGroup"}, [[4, 3]]),
    "DeviceMesh": ({"process_group": "DeviceMesh"}, [[4, 3]]),
    "named dim": ({"process_group": "named dim"}, [[4, 3]]),
    "node": ({"process_group": "node"}, [[4, 3]]),
    "int": ({"process_group": 2}, [[4, 3]]),
}


def _against_whole_batch(backend: str, cases: list[str]) -> dict[str, tuple[float, int]]:
    out = {}
    for case in cases:
        options, splits = OVER_RANKS[case]
        options = dict(options)
        spatial = options.pop("spatial", (5,))
        if "process_group" in options:
            options["process_group"] = _group(options["process_group"])
        counter = CompileCounterWithBackend(backend)
        mine = _compiled(syncnorm.SyncBatchNorm1d(3, dtype=torch.float64, **options), counter)
        plain = {k: v for k, v in options.items() if k not in ("process_group", "backend")}
        theirs = torchs(nn.BatchNorm1d, 3, dtype=torch.float64, **plain)
        worst = 0.0
        for split in splits:
            errors = step_errors(mine, theirs, (sum(split), 3, *spatial), split, second_order=False)
            worst = max(worst, *errors.values())
        out[case] = worst, counter.frame_count
    return out


@pytest.mark.slow
def test_compiled_step_equals_the_whole_batch() -> None:
    for per_rank in run_ranks(_against_whole_batch, 2, "aot_eager", list(OVER_RANKS), timeout=240):
        assert not {case: error for case, (error, _) in per_rank.items() if error > BOUND}
        # One graph for one shape; with other sizes one more that leaves the size open, and one for 0 or 1, which have
        # no room in it.
        compilations = {case: count for case, (_, count) in per_rank.items()}
        assert compilations.pop("uneven, other sizes each step") == 2
        assert compilations.pop("empty shards") <= 3
        assert set(compilations.values()) == {1}, compilations


@pytest.mark.slow
def test_inductor_step_equals_the_whole_batch() -> None:
    cases = ["empty shards, no statistics"]  # nothing but the shape of the output needs that exchange
    for per_rank in run_ranks(_against_whole_batch, 2, "inductor", cases, timeout=240):
        assert not {case: error for case, (error, _) in per_rank.items() if error > BOUND}


# ---------------------------------------------------------------------------------------------- a model and its optimizer


def _model(convert: bool) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(),
        nn.Linear(20, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 1),
    ).double()  # fmt: skip
    return syncnorm.convert(model) if convert else model


def _train(model: nn.Module, forward: Callable[[Tensor], Tensor], batches: Tensor, part: slice) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        (forward(batch[part]).square().sum() / len(batch)).backward()
        if part != slice(None) and dist.is_initialized():
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
    return [t.detach().clone() for t in model.state_dict().values()]


def _training(backend: str) -> float:
    batches = torch.randn(4, 2, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = _model(convert=False)
    exact = _train(whole, whole, batches, slice(None))
    if not dist.is_initialized():
        mine = _model(convert=True)
        got = _train(mine, torch.compile(mine, fullgraph=True, backend=backend), batches, slice(None))
    else:  # each rank holds one sample: the second norm sees one value per channel here, two in all
        mine = _model(convert=True)
        got = _train(mine, torch.compile(mine, fullgraph=True, backend=backend), batches, my_slice([1, 1]))
    return max(float((a - b).abs().max()) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_equals_one_process(backend: str) -> None:
    # Four steps of SGD with momentum; with two samples ReLU networks amplify rounding by a few hundred.
    torch._dynamo.reset()
    assert _training(backend) <= 1e-10
    assert max(run_ranks(_training, 2, backend, timeout=240)) <= 1e-10


# --------------------------------------------------------------------------------------------------------- against eager


def _step(layer: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weight).sum().backward()
    return [y.detach(), x.grad, *[p.grad.clone() for p in layer.parameters()], *[b.clone() for b in layer.buffers()]]


def _against_eager(backend: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x, weight = torch.randn(2, 4, 4, 3, 5, generator=generator, dtype=torch.float64).unbind(0)
    cases: dict[str, dict[str, Any]] = {
        "accumulate": {"accumulate": 2},
        "accumulate, cumulative average": {"accumulate": 2, "momentum": None},
        "group of one": {"process_group": 1},
        "cumulative average": {"momentum": None},
        "named backend": {"backend": "reference"},
    }
    out: dict[str, Any] = {}
    for case, options in cases.items():
        eager = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64, **options)
        counter = CompileCounterWithBackend(backend)
        mine = _compiled(copy.deepcopy(eager), counter)
        worst = 0.0
        for step in range(4):
            pairs = zip(_step(mine, x[step], weight[step]), _step(eager, x[step], weight[step]), strict=True)
            worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
        out[case] = worst, counter.frame_count
    return out


def test_compiled_step_equals_eager_in_one_process() -> None:
    for case, (error, compilations) in _against_eager("aot_eager").items():
        assert error <= BOUND and compilations == 1, (case, error, compilations)


def test_compiled_step_equals_eager_over_ranks() -> None:
    for per_rank in run_ranks(_against_eager, 2, "aot_eager", timeout=120):
        for case, (error, compilations) in per_rank.items():
            assert error <= BOUND and compilations == 1, (case, error, compilations)


def _two_layers() -> dict[str, float]:
    out = {}
    for make in (syncnorm.SyncBatchNorm1d, syncnorm.modules.SwitchableNorm1d):
        torch._dynamo.reset()
        torch.manual_seed(4)
        first, second = make(3).double(), make(3).double()
        x = torch.randn(4, 3, 2, dtype=torch.float64)[: 4 * (1 - dist.get_rank())]

        def forward(x: Tensor, y: Tensor, first: nn.Module = first, second: nn.Module = second) -> Tensor:
            return first(x).cos() + second(y)

        found = []
        for function in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
            inputs = [x.clone().requires_grad_(), x.sin().requires_grad_()]
            y = function(*inputs)
            gradients = torch.autograd.grad(y.sum(), [*inputs, *first.parameters(), *second.parameters()])
            found.append(torch.cat([t.detach().flatten() for t in (y, *gradients)]))
        out[make.__name__] = float((found[0] - found[1]).abs().max())
    return out


def test_an_empty_shard_exchanges_once_for_each_layer_of_a_graph() -> None:
    # Rows of constants are common subexpressions.
    for per_rank in run_ranks(_two_layers, 2, timeout=120):
        assert max(per_rank.values()) <= BOUND, per_rank


def _half_precision() -> dict[str, float]:
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(2, 6, 3, 5, generator=generator).bfloat16().unbind(0)
    part = my_slice([4, 2]) if dist.is_initialized() else slice(None)
    layer = syncnorm.SyncBatchNorm1d(3)
    exact = _step(nn.BatchNorm1d(3, dtype=torch.float64), x.double(), weight.double())
    mine = _step(_compiled(layer), x[part], weight[part])
    assert mine[0].dtype == mine[1].dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
    errors = {"y": (mine[0].double() - exact[0][part]).abs() / exact[0][part].abs().clamp(min=1e-3)}
    errors["dx"] = (mine[1].double() - exact[1][part]).abs() / exact[1][part].abs().clamp(min=1e-3)
    return {name: float(error.max()) for name, error in errors.items()}


def test_half_precision_input_rounds_once_when_compiled() -> None:
    # Computed in float32 and rounded once to 8 bits: half a step of 2^-7, and float32's own rounding where values near
    # 1 cancel to 1e-3 (1e-3·2^-8 is 4e-6, float32 sums of such values are off by some 1e-7).
    bound = 2**-8 + 5e-4
    assert max(_half_precision().values()) <= bound
    for per_rank in run_ranks(_half_precision, 2):
        assert max(per_rank.values()) <= bound, per_rank


def _evaluation() -> None:
    layer = syncnorm.SyncBatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64) * 3 + 1
    counter = CompileCounterWithBackend("aot_eager")
    compiled = _compiled(copy.deepcopy(layer), counter)
    for _ in range(3):  # train and evaluate in turn: one graph each, and no new one when it comes back
        layer.train()(x), compiled.train()(x)
        if not dist.is_initialized() or dist.get_rank() == 0:  # evaluation on one rank alone waits for nobody
            theirs = layer.eval()(x)
            torch.testing.assert_close(compiled.eval()(x), theirs, rtol=BOUND, atol=BOUND)
    assert counter.frame_count == (2 if not dist.is_initialized() or dist.get_rank() == 0 else 1)


def test_train_and_eval_are_one_graph_each() -> None:
    _evaluation()
    run_ranks(_evaluation, 2)


# ------------------------------------------------------------------------------------------------------------- the graph


def _exchanges() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"forward": [], "backward": []}

    def recording(direction: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            names = [str(node.target) for node in graph.graph.nodes]
            found[direction].append(count_exchanges(graph.graph))
            assert not any(word in name for name in names for word in ("_local_scalar_dense", "nonzero", "aten.item"))
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=recording("forward"), bw_compiler=recording("backward"), keep_inference_input_mutations=True
    )
    layer = _compiled(syncnorm.SyncBatchNorm1d(3, momentum=None), backend)
    num_samples = 4 if dist.get_rank() == 0 else 0  # a shard without samples must not lose its exchange to dead code
    layer(torch.randn(num_samples, 3, 5, requires_grad=True)).square().sum().backward()
    return found


def test_each_direction_has_one_exchange_and_reads_nothing_back() -> None:
    for per_rank in run_ranks(_exchanges, 2):
        assert per_rank == {"forward": [1], "backward": [1]}


def _breaks() -> tuple[int, int]:
    torch._dynamo.reset()
    model = _model(convert=True)
    explanation = torch._dynamo.explain(model)(torch.randn(2, 2, 6, dtype=torch.float64))
    return explanation.graph_break_count, explanation.graph_count


def test_no_graph_break() -> None:
    assert _breaks() == (0, 1)
    assert run_ranks(_breaks, 2) == [(0, 1), (0, 1)]


def _under_ddp() -> float:
    batch = torch.randn(6, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = _model(convert=False)
    whole(batch).square().mean().backward()
    worst = 0.0
    for wrap_first in (True, False):
        torch._dynamo.reset()
        model = _model(convert=True)
        if wrap_first:
            forward: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        else:
            forward = DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager"))
        forward(batch[my_slice([3, 3])]).square().mean().backward()
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            worst = max(worst, float((mine.grad - theirs.grad).abs().max()))
        for mine, theirs in zip(model.buffers(), whole.buffers(), strict=True):
            worst = max(worst, float((mine - theirs).abs().max()))
    return worst


def test_compiled_before_and_after_ddp() -> None:
    assert max(run_ranks(_under_ddp, 2)) <= BOUND


# ---------------------------------------------------------------------------------------------------------------- errors


def _one_value_in_all(backend: str) -> tuple[str, list[Any]]:
    layer = _compiled(syncnorm.SyncBatchNorm1d(3, accumulate=2 if backend == "aot_eager" else 1), backend)
    before = [b.tolist() for b in layer.buffers()]
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(1 if dist.get_rank() == 0 else 0, 3, requires_grad=True))
    return str(caught.value), [before, [b.tolist() for b in layer.buffers()]]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_value_in_the_whole_group_is_an_error_and_changes_nothing(backend: str) -> None:
    for text, (before, after) in run_ranks(_one_value_in_all, 2, backend, timeout=120):
        assert "expected more than 1 value per channel in the whole group when training, got 1" in text
        assert before == after


def test_refusals_keep_their_words() -> None:
    cases = [
        (syncnorm.SyncBatchNorm1d(3), torch.randn(1, 3), "expected more than 1 value per channel when training"),
        (syncnorm.SyncBatchNorm1d(3), torch.randn(4, 5), "expected 3 channels in dim 1"),
        (
            syncnorm.SyncBatchNorm1d(3, backend="aten"),
            torch.randn(4, 3),
            "inside torch.compile the traceable reference",
        ),
    ]
    for layer, x, words in cases:
        with pytest.raises(Exception, match=words):  # Dynamo wraps it in an error of its own
            _compiled(layer)(x)


@pytest.mark.slow
def test_norms_of_samples_behind_a_convolution_are_compiled_for_every_size() -> None:
    """Inductor of torch 2.13 fails at the backward of ``var_mean`` there."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), syncnorm.modules.FilterResponseNorm(4))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 9, 9), (3, 3, 7, 11)):
        x = torch.randn(shape)
        steps = []
        for module in (compiled, model):
            model.zero_grad()
            module(x).pow(3).sum().backward()
            steps.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-3)
