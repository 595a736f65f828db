"""Tier: no process (and gloo ranks where marked). State, constructor and modes are torch's; alone, the bits are too."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import syncnorm
from syncnorm.kernels import aten
from syncnorm.testing import run_ranks
from tests.oracles import my_slice, randomise_affine

PAIRS = [
    (syncnorm.SyncBatchNorm1d, nn.BatchNorm1d, (5, 3)),
    (syncnorm.SyncBatchNorm1d, nn.BatchNorm1d, (5, 3, 7)),
    (syncnorm.SyncBatchNorm2d, nn.BatchNorm2d, (5, 3, 4, 7)),
    (syncnorm.SyncBatchNorm3d, nn.BatchNorm3d, (2, 3, 4, 3, 5)),
    (syncnorm.SyncBatchNorm, nn.BatchNorm2d, (5, 3, 4, 7)),
]
SETTINGS: list[dict[str, Any]] = [
    {}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"momentum": 0.3, "eps": 1e-2}, {"affine": False},
    {"bias": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False},
]  # fmt: skip


def _equal(mine: nn.Module, theirs: nn.Module) -> bool:
    a, b = mine.state_dict(), theirs.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def _used(layer: nn.Module) -> nn.Module:
    """With state that is not the initial one."""
    generator = torch.Generator().manual_seed(0)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.fill_(7)
    return layer


# ------------------------------------------------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(("ours", "torchs"), [*[p[:2] for p in PAIRS[1:]], (syncnorm.SyncBatchNorm, nn.SyncBatchNorm)])
def test_state_dicts_go_both_ways(ours: type, torchs: type, options: dict[str, Any]) -> None:
    supported = {k: v for k, v in options.items() if k in inspect.signature(torchs.__init__).parameters}
    if supported != options:
        pytest.skip(f"{torchs.__name__} of this torch has no {set(options) - set(supported)}")
    mine, theirs = _used(ours(3, **options)), torchs(3, **options)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert [t.shape for t in mine.state_dict().values()] == [t.shape for t in theirs.state_dict().values()]
    assert [t.dtype for t in mine.state_dict().values()] == [t.dtype for t in theirs.state_dict().values()]
    assert mine.state_dict()._metadata[""] == theirs.state_dict()._metadata[""]
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert _equal(mine, theirs)
    fresh = ours(3, **options)
    fresh.load_state_dict(_used(torchs(3, **options)).state_dict(), strict=True)
    assert _equal(fresh, theirs)
    assert sorted(dict(mine.named_parameters())) == sorted(dict(theirs.named_parameters()))
    assert sorted(dict(mine.named_buffers())) == sorted(dict(theirs.named_buffers()))


@pytest.mark.parametrize("version", [None, 1])
def test_checkpoints_from_before_the_counter_load(version: int | None) -> None:
    state = _used(nn.BatchNorm2d(3)).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""] = {} if version is None else {"version": version}
    mine, theirs = syncnorm.SyncBatchNorm2d(3), nn.BatchNorm2d(3)
    for layer in (mine, theirs):
        layer.load_state_dict(state, strict=True)
    assert _equal(mine, theirs) and mine.num_batches_tracked == 0
    state._metadata[""] = {"version": 2}
    with pytest.raises(RuntimeError, match="Missing key"):
        mine.load_state_dict(state, strict=True)


def test_sums_of_micro_batches_are_not_part_of_the_state() -> None:
    layer = syncnorm.SyncBatchNorm2d(3, accumulate=4)
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    nn.BatchNorm2d(3).load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict(), strict=True)


# ----------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_precision_keeps_wide_statistics(convert: Callable[[nn.Module], nn.Module], accumulate: int) -> None:
    layer = convert(_used(syncnorm.SyncBatchNorm2d(3, accumulate=accumulate)))
    dtype = layer.weight.dtype
    assert dtype in (torch.float16, torch.bfloat16) and layer.bias.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.num_batches_tracked.dtype == torch.int64
    assert accumulate == 1 or layer._pending.dtype == torch.float64

    # The statistics are those of the rounded input in float64, to float32; the output is rounded once.
    exact = nn.BatchNorm2d(3, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) + 3).to(dtype)
    for training in (True, False):
        layer.train(training), exact.train(training)
        for _ in range(accumulate if training else 1):
            y = layer(x)
        expected = exact(torch.cat([x.double()] * accumulate))[: len(x)]  # the statistics of all micro-batches as one
        assert y.dtype == dtype
        # half a step of the output's dtype, and float32's own rounding where the affine map cancels
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5
        assert ((y.double() - expected).abs() <= bound).all()
        for name in ("running_mean", "running_var"):
            error = (getattr(layer, name).double() - getattr(exact, name)).abs()
            assert (error <= 4 * 2**-24 * getattr(exact, name).abs()).all()
    wide = layer.float()
    assert wide.running_mean.dtype == wide.weight.dtype == torch.float32


def test_small_moves_are_not_lost_in_half_precision() -> None:
    # In bfloat16 a running average near 1 stands still: a tenth of 0.01 is below its rounding.
    layer = syncnorm.SyncBatchNorm1d(2).bfloat16()
    layer.running_mean.fill_(1.0)
    x = (
        torch.full((6, 2), 1.0078125, dtype=torch.bfloat16)
        + torch.tensor([[1.0], [-1.0]] * 3, dtype=torch.bfloat16) / 8
    )
    for _ in range(20):
        layer(x)
    expected = 1.0 + (float(x.double().mean()) - 1.0) * (1 - 0.9**20)
    assert abs(layer.running_mean[0].item() - expected) <= 20 * 2**-24


def test_double_and_back() -> None:
    layer = syncnorm.SyncBatchNorm2d(3).double()
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float64, torch.int64}
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    theirs = nn.BatchNorm2d(3).double()
    assert torch.equal(layer(x), theirs(x)) and _equal(layer, theirs)
    layer.half()
    # Not float32 from float64: .half() asks for less, and what is there is kept as it is.
    assert layer.running_mean.dtype == torch.float64 and layer.weight.dtype == torch.float16


def test_meta_and_to_empty() -> None:
    layer = syncnorm.SyncBatchNorm2d(3, accumulate=2).bfloat16().to("meta")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    assert layer.running_mean.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert layer(torch.empty(4, 3, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (4, 3, 5, 5)

    born = syncnorm.SyncBatchNorm2d(3, device="meta", accumulate=2)
    real = born.to_empty(device="cpu")
    real._pending.fill_(float("nan"))  # whatever the memory held
    real.reset_parameters()
    assert _equal(real, nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 5, 5)
    whole = nn.BatchNorm2d(3)
    whole(torch.cat([x, x + 1]))
    real(x), real(x + 1)
    torch.testing.assert_close(real.running_mean, whole.running_mean)
    torch.testing.assert_close(real.running_var, whole.running_var)


# --------------------------------------------------------------------------------------------- constructor and conversion


def test_the_constructor_is_that_of_torchs_sync_batch_norm() -> None:
    torchs = list(inspect.signature(nn.SyncBatchNorm.__init__).parameters.values())
    wanted = [(p.name, p.default) for p in torchs if p.kind is p.POSITIONAL_OR_KEYWORD]
    for ours in {pair[0] for pair in PAIRS}:
        mine = list(inspect.signature(ours.__init__).parameters.values())
        assert [(p.name, p.default) for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD] == wanted
        layer = ours(3, 1e-3, None, True, False, None, torch.device("cpu"), torch.float64, bias=False)
        assert (layer.eps, layer.momentum, layer.weight.dtype, layer.bias) == (1e-3, None, torch.float64, None)
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
        assert ours(3, affine=False).weight is ours(3, affine=False).bias is None
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)


def test_the_representation_shows_what_is_not_the_default() -> None:
    known = inspect.signature(nn.BatchNorm2d).parameters
    for options in [options for options in SETTINGS if options.keys() <= known.keys()]:
        torchs = repr(nn.BatchNorm2d(3, **options))
        assert repr(syncnorm.SyncBatchNorm2d(3, **options)) == "Sync" + torchs
        text = repr(syncnorm.SyncBatchNorm2d(3, **options, process_group=2, backend="aten", accumulate=4))
        assert text == f"Sync{torchs[:-1]}, process_group=2, backend=aten, accumulate=4)"
    assert "process_group=node" in repr(syncnorm.SyncBatchNorm1d(3, process_group="node"))


def test_convert_sync_batchnorm_is_torchs_classmethod() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Sequential(nn.BatchNorm3d(3), shared), nn.InstanceNorm2d(3))
    tensors = list(model.state_dict(keep_vars=True).values())
    same = syncnorm.SyncBatchNorm.convert_sync_batchnorm(model, 2)
    assert same is model and model[1] is model[2][1] is shared
    assert [type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__] == [
        "SyncBatchNorm2d", "SyncBatchNorm3d", "InstanceNorm2d",
    ]  # fmt: skip
    assert shared.process_group == 2
    assert all(a is b for a, b in zip(tensors, model.state_dict(keep_vars=True).values(), strict=True))
    assert syncnorm.SyncBatchNorm.convert_sync_batchnorm(model)[1].process_group == 2  # keeps what is not given
    root = nn.BatchNorm1d(3)
    assert syncnorm.SyncBatchNorm.convert_sync_batchnorm(root) is root and type(root) is syncnorm.SyncBatchNorm1d


# ------------------------------------------------------------------------------------------------- alone, the same bits


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "contiguous", x.contiguous()
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "strided", torch.stack([x, x], -1)[..., 0]
    yield "one sample broadcast", x[:1].expand_as(x)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS)
def test_one_process_has_the_bits_of_torch(
    ours: type, torchs: type, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    if "bias" in options and "bias" not in inspect.signature(torchs.__init__).parameters:
        pytest.skip("this torch has no bias=False")
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        mine, theirs = ours(3, **options), torchs(3, **options)
        if dtype == torch.float64:
            mine.double(), theirs.double()
        randomise_affine(theirs)
        mine.load_state_dict(theirs.state_dict())
        for name, x in _layouts(torch.randn(shape, generator=generator).to(dtype) + 2):
            for training in (True, False, True):
                mine.train(training), theirs.train(training)
                results = []
                for layer in (mine, theirs):
                    layer.zero_grad()
                    leaf = x.detach().requires_grad_()
                    y = layer(leaf)
                    y.square().sum().backward()
                    assert y.dtype == dtype
                    results.append([y.detach(), leaf.grad, *[p.grad for p in layer.parameters()], *layer.buffers()])
                for a, b in zip(*results, strict=True):
                    assert torch.equal(a, b) and a.stride() == b.stride(), (name, training, dtype)


def test_tracking_can_be_toggled_at_run_time() -> None:
    mine, theirs = syncnorm.SyncBatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for tracking, training, momentum in [
        (True, True, None),
        (False, True, None),
        (False, False, 0.1),
        (True, True, 0.5),
    ]:
        x = torch.randn(4, 3, 2, 2)
        for layer in (mine, theirs):
            layer.track_running_stats, layer.momentum = tracking, momentum
            layer.train(training)
        assert torch.equal(mine(x), theirs(x)) and _equal(mine, theirs)


# ------------------------------------------------------------------------------------------------------ a life of a layer


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_a_forward_that_fails_changes_nothing(
    backend: str, momentum: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _used(syncnorm.SyncBatchNorm2d(3, backend=backend, momentum=momentum))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 3, 2, 2)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.nn.functional, "batch_norm", fails)
    monkeypatch.setattr(aten, "batch_normalize", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_inference_mode_leaves_a_layer_that_can_train(backend: str) -> None:
    mine, theirs = syncnorm.SyncBatchNorm2d(3, backend=backend, accumulate=1), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    for layer in (mine, theirs):
        with torch.inference_mode():
            layer(x)  # in training mode: moves the statistics
            layer.eval()(x)
        leaf = x.clone().requires_grad_()
        layer.train()(leaf).square().sum().backward()
        assert leaf.grad is not None and not any(b.is_inference() for b in layer.buffers())
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_a_counter_of_another_dtype_counts(dtype: torch.dtype) -> None:
    layer, torchs = syncnorm.SyncBatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2)
    for norm in (layer, torchs):
        state = norm.state_dict()
        norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(5, dtype=dtype)}, assign=True)
        norm(x)
        assert norm.num_batches_tracked == torch.tensor(6) and norm.num_batches_tracked.dtype == dtype
    torch.testing.assert_close(layer.running_var, torchs.running_var)


def test_reset_starts_again() -> None:
    layer = _used(syncnorm.SyncBatchNorm2d(3, accumulate=2))
    layer(torch.randn(4, 3, 2, 2))  # the first of two micro-batches
    layer.reset_running_stats()
    assert layer.running_mean.tolist() == [0] * 3 and layer.running_var.tolist() == [1] * 3
    assert layer.num_batches_tracked == 0 and float(layer.weight.detach()[0]) != 1.0
    layer.reset_parameters()
    assert _equal(layer, nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 2, 2)
    layer(x)
    assert layer.num_batches_tracked == 0, "the micro-batch before the reset still counts"
    layer(x)
    assert layer.num_batches_tracked == 1


# ----------------------------------------------------------------------------------------------------- weight averaging


def _model(convert: bool) -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    return syncnorm.convert(model) if convert else model


def _averaging(convert: bool, splits: list[int]) -> list[Tensor]:
    batches = torch.randn(6, sum(splits), 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    part = my_slice(splits) if convert and dist.is_initialized() else slice(None)
    model = _model(convert)
    swa = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for batch in batches:
        model(batch[part])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9).add_(0.01)  # as an optimizer would
        swa.update_parameters(model)
        ema.update_parameters(model)
    model[1].momentum = 0.3
    twin = copy.deepcopy(swa)
    update_bn([batch[part] for batch in batches], twin)  # cumulative averages of the averaged model
    assert [m.momentum for m in twin.modules() if hasattr(m, "momentum")] == [0.1, 0.1]
    types = {type(m) for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert types == {syncnorm.SyncBatchNorm1d if convert else nn.BatchNorm1d}
    return [t.detach().double().clone() for m in (swa, ema, twin) for t in m.state_dict().values()]


def _averaging_error(splits: list[int]) -> float:
    pairs = zip(_averaging(True, splits), _averaging(False, splits), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_weight_averaging_treats_ours_as_torchs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _averaging_error([5]) == 0.0


@pytest.mark.gloo
def test_weight_averaging_over_ranks_equals_one_process() -> None:
    assert max(run_ranks(_averaging_error, 2, [3, 2])) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_made_in_half_precision_has_float32_statistics(dtype: torch.dtype) -> None:
    layer = syncnorm.SyncBatchNorm2d(3, dtype=dtype)
    assert (layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype) == (
        dtype,
        torch.float32,
        torch.float32,
    )
    assert layer(torch.randn(2, 3, 4, 4).to(dtype)).dtype == dtype
