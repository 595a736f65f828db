"""Claims about the triton kernels, on whatever runs them: the interpreter on CPU (TRITON_INTERPRET=1), else a GPU.

Not collected by itself: test_triton_interpreted.py runs it in a process of its own, as triton reads that variable when it
is imported, and tests/gpu/ on a GPU.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import syncnorm
from syncnorm.core.activation import ACTIVATIONS, Activation
from syncnorm.kernels import triton as kernels
from syncnorm.kernels.triton import rows as row_kernels

triton = pytest.importorskip("triton", reason="triton is not installed (the extra `triton`)")

import triton.language as tl  # noqa: E402

from syncnorm.core import running as core_running  # noqa: E402
from syncnorm.core.moments import Moments  # noqa: E402
from syncnorm.core.running import RunningStatistics  # noqa: E402
from syncnorm.kernels import vectors  # noqa: E402
from syncnorm.kernels.triton import _batch, _launch, _plan, _rows, _whole, among  # noqa: E402
from syncnorm.kernels.triton._tiles import locate  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = 1e-5
GUARD = 64

# What is stored in half precision is rounded once; the interpreter's bfloat16 is truncated, which is a whole ulp.
ULPS = 1.0 if INTERPRETED else 0.5


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs begin as NaN and stand before a strip of it, so that an element left out or one too many shows."""
    strips = []

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        n = math.prod(shape)
        memory = torch.full((n + GUARD,), float("nan") if dtype.is_floating_point else 0xA5, dtype=dtype, device=device)
        if type(memory) is Tensor:  # and no stand-in of a compiler
            strips.append(memory[n:])
        return memory[:n].view(shape)

    monkeypatch.setattr(_batch, "empty", poisoned)
    monkeypatch.setattr(_rows, "empty", poisoned)
    monkeypatch.setattr(_whole, "empty", poisoned)
    monkeypatch.setattr(among, "empty", poisoned)
    yield
    for strip in strips:
        assert strip.isnan().all() if strip.is_floating_point() else (strip == 0xA5).all(), "written behind an output"


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, splits and steps for tensors of a few hundred elements."""
    small = {"TILE_BYTES": 1024, "CHANNELS_LAST_BYTES": 64}
    for name, value in (small | {"TILES_PER_SPLIT": 2, "PROGRAMS_PER_MULTIPROCESSOR": 2}).items():
        monkeypatch.setattr(_plan, name, value)
    monkeypatch.setattr(_plan, "multiprocessors", lambda device: 2)  # the interpreter's, on a device too


def randn(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1, offset: float = 0
) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * scale + offset).to(dtype).to(DEVICE)


def check(
    name: str, value: Tensor, exact: Tensor, dtype: torch.dtype, terms: float = 1, scale: Tensor | float = 0
) -> None:
    """Off by one rounding to the value's dtype, and by what ``terms`` float32 additions lose, relative to the largest."""
    held = 1e-13 if dtype == torch.float64 else 2**-23 * (4 + terms**0.5)
    stored = 0.0 if value.dtype.itemsize >= 4 else torch.finfo(value.dtype).eps * ULPS
    size = max(float(exact.abs().max()), float(scale))
    assert value.shape == exact.shape, (name, value.shape, exact.shape)
    error = float((value.double() - exact).abs().max())
    assert error <= (held + stored) * size, (name, error, (held + stored) * size)


def flat(x: Tensor, channels_last: bool) -> Tensor:
    """[N, C, S] as the seam takes it."""
    return x.transpose(1, 2).reshape(-1, x.size(1)).contiguous() if channels_last else x.contiguous()


BATCH = [(2, 3, 199), (2, 33, 7), (2, 3, 64), (1, 1, 2), (7, 33, 1)]
LAYOUTS = [False, True]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in BATCH), *((BATCH[0], dtype) for dtype in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
def test_batch_moments(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype, scale=2, offset=3)
    moments = kernels.batch_moments(flat(x, channels_last))
    count = x.numel() // shape[1]
    assert moments.count == count
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    check("mean", moments.mean, mean, dtype, count)
    check("m2", moments.m2, var * count, dtype, count)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
def test_moments_of_many_splits_at_a_large_mean(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "PROGRAMS_PER_MULTIPROCESSOR", 8)
    x = randn(4, 3, 130, dtype=torch.float32, offset=1e4)
    x[0] += 1e5  # the first tiles are far from the rest
    moments = kernels.batch_moments(flat(x, channels_last))
    assert _plan.plan_walk(flat(x, channels_last), tensors=1, reduces=True).splits > 1
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(moments.var, var, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "with_residual"),
    [
        *((shape, torch.float32, "relu", True) for shape in BATCH),
        *(((2, 9, 21), dtype, "relu", residual) for dtype in DTYPES for residual in (False, True)),
        *(((2, 3, 19), torch.float32, name, residual) for name in ("", *ACTIVATIONS) for residual in (False, True)),
        ((2, 3, 19), torch.bfloat16, "gelu", True),
        *(((2, 3, 19), torch.float64, name, True) for name in ("leaky_relu", "gelu")),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.usefixtures("_small_tiles")
def test_batch_norm_and_its_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, with_residual: bool, channels_last: bool
) -> None:
    act = Activation(activation, 0.1) if activation else None
    x, g, r = (randn(*shape, dtype=dtype, seed=i, scale=1 + i, offset=i) for i in range(3))
    weight, bias = randn(2, shape[1], dtype=torch.float32, seed=3)
    exact = exact_batch_norm(x, g, r if with_residual else None, weight, bias, act)
    count = x.numel() // shape[1]

    x_flat, g_flat, r_flat = (flat(t, channels_last) for t in (x, g, r))
    residual = r_flat if with_residual else None
    moments = kernels.batch_moments(x_flat)
    rstd = (moments.var + EPS).rsqrt()
    y, mask = kernels.batch_normalize(x_flat, moments.mean, rstd, weight, bias, act, residual)
    packed = with_residual and act is not None and act.is_piecewise_linear
    assert (mask is not None) == packed
    if mask is not None:
        bits = (mask[:, :, None] >> torch.arange(8, device=DEVICE)).bitwise_and(1).flatten(1)
        width = x_flat.size(-1)
        assert (bits[:, :width] == (y > 0).reshape(-1, width)).double().mean() > (
            1 if dtype.itemsize > 2 else 0.99
        ) - 1e-9
        assert not bits[:, width:].any()
    side = mask if packed else residual if act is not None else None
    sums = kernels.batch_backward_reduce(g_flat, x_flat, moments.mean, rstd, weight, bias, act, side)
    dx, dresidual = kernels.batch_backward_input(
        g_flat, x_flat, moments.mean, rstd, weight, sums / count, bias, act, side, True
    )  # fmt: skip
    assert (dresidual is not None) == (act is not None)
    assert y.dtype == dx.dtype == dtype and sums.dtype == torch.float64

    largest = float((rstd * weight).abs().max())
    check("y", y, flat(exact["y"], channels_last), dtype, count)
    check("dbias", sums[0], exact["dbias"], dtype, count, g.double().abs().sum((0, 2)).max())
    check("dweight", sums[1], exact["dweight"], dtype, count, g.double().abs().sum((0, 2)).max())
    check("dx", dx, flat(exact["dx"], channels_last), dtype, count, largest * float(g.abs().max()))
    if dresidual is not None:
        check("dresidual", dresidual, flat(exact["dresidual"], channels_last), dtype)


WHOLE = [
    ((5, 3, 199), torch.float32, "", False),
    ((3, 33, 7), torch.float32, "relu", True),
    ((2, 70, 3), torch.float32, "silu", False),
    ((4, 9, 21), torch.bfloat16, "gelu", True),
    ((2, 5, 1), torch.float64, "leaky_relu", True),
    ((2, 5, 8), torch.float16, "relu", False),
]


@pytest.mark.parametrize(("shape", "dtype", "activation", "with_residual"), WHOLE, ids=str)
@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("ranks", [1, 2], ids=["alone", "among two"])
@pytest.mark.usefixtures("_small_tiles")
def test_a_whole_direction(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, with_residual: bool, channels_last: bool, ranks: int
) -> None:
    act = Activation(activation, 0.1) if activation else None
    x, g, r = (randn(*shape, dtype=dtype, seed=i, scale=1 + i, offset=i) for i in range(3))
    weight, bias = randn(2, shape[1], dtype=torch.float32, seed=3)
    exact = exact_batch_norm(x, g, r if with_residual else None, weight, bias, act)
    C, count = shape[1], x.numel() // shape[1]
    xs, gs, rs = ([flat(part, channels_last) for part in t.split([1, shape[0] - 1][-ranks:] if ranks == 2 else shape[0])]
                  for t in (x, g, r))  # fmt: skip
    residuals = rs if with_residual else [None] * ranks
    if ranks == 1:
        forwards = [kernels.batch_forward(xs[0], weight, bias, EPS, act, residuals[0])]
    else:
        words = (2.0**32, 3e6, 65535.0, 65535.0**2, 1.0, 1.0)
        width = 2 * C + 1 + 600 + len(words)
        rows = [among.batch_forward_row(part, width, words) for part in xs]
        for row in rows:
            assert row[-6:].tolist() == list(words) and not row[2 * C + 1 : -6].any()
        row = rows[0] + rows[1]
        forwards = [
            among.batch_forward_rest(row, 6, part, weight, bias, EPS, act, residual)[:4]
            for part, residual in zip(xs, residuals, strict=True)
        ]
        assert among.batch_forward_row(xs[0], 2 * C + 1, ()).numel() == 2 * C + 1
    ys, moments, rstds, masks = zip(*forwards, strict=True)
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    assert float(moments[0].count) == count and isinstance(moments[0].count, Tensor) == (ranks == 2)
    check("mean", moments[0].mean, mean, dtype, count)
    check("m2", moments[0].m2, var * count, dtype, count)
    check("rstd", rstds[0], (moments[0].var + EPS).rsqrt(), torch.float64)
    smooth = act is not None and not act.is_piecewise_linear
    sides = [residual if smooth else mask for residual, mask in zip(residuals, masks, strict=True)]
    fixed = [(g, x, m.mean, s, weight, bias if act else None, act, side)
             for g, x, m, s, side in zip(gs, xs, moments, rstds, sides, strict=True)]  # fmt: skip
    if ranks == 1:
        dx, dresidual, dbias, dweight = kernels.batch_backward(*fixed[0], True)
        outcomes = [(dx, dresidual)]
    else:
        packed = [among.batch_backward_row(*arguments, 2 * C + 9, (7.0,)) for arguments in fixed]
        row, dbias, dweight = (a.double() + b.double() for a, b in zip(*packed, strict=True))
        assert row[-1] == 14 and not row[2 * C : -1].any()
        outcomes = [
            among.batch_backward_rest(row, 1, m.count, *arguments, True)[:2]
            for m, arguments in zip(moments, fixed, strict=True)
        ]
    largest = float((rstds[0] * weight).abs().max())
    ys, dxs = (torch.cat(parts) for parts in (ys, [dx for dx, _ in outcomes]))
    check("y", ys, flat(exact["y"], channels_last), dtype, count)
    check("dx", dxs, flat(exact["dx"], channels_last), dtype, count, largest * float(g.abs().max()))
    check("dbias", dbias.double(), exact["dbias"], torch.float32, count, g.double().abs().sum((0, 2)).max())
    check("dweight", dweight.double(), exact["dweight"], torch.float32, count, g.double().abs().sum((0, 2)).max())
    if act is None:
        assert all(dresidual is None for _, dresidual in outcomes)
    else:
        dresiduals = torch.cat([dresidual for _, dresidual in outcomes])
        check("dresidual", dresiduals, flat(exact["dresidual"], channels_last), dtype, scale=g.abs().max())


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_are_normalised_by_themselves(channels_last: bool, dtype: torch.dtype) -> None:
    sizes, shape = [1, 3, 2], (6, 5, 7)
    x, g = (randn(*shape, dtype=dtype, seed=i, offset=i) for i in range(2))
    weight, bias = randn(2, 5, dtype=torch.float32, seed=3)
    chunks = [size * (7 if channels_last else 1) for size in sizes]
    x_flat, g_flat = flat(x, channels_last), flat(g, channels_last)
    y, moments, rstd, mask = kernels.batch_forward(x_flat, weight, bias, EPS, None, None, chunks)
    assert mask is None and moments.mean.shape == moments.m2.shape == rstd.shape == (3, 5)
    assert moments.count.tolist() == [7.0, 21.0, 14.0]
    dx, dresidual, dbias, dweight = kernels.batch_backward(
        g_flat, x_flat, moments.mean, rstd, weight, None, None, None, False, chunks
    )  # fmt: skip
    assert dresidual is None
    parts = [
        exact_batch_norm(a, b, None, weight, bias, None) for a, b in zip(x.split(sizes), g.split(sizes), strict=True)
    ]
    exact = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
    size = float((rstd.max() * weight.abs().max() * g.abs().max()).double())
    check("y", y, flat(exact["y"], channels_last), dtype, 21)
    check("dx", dx, flat(exact["dx"], channels_last), dtype, 21, size)
    for name, value in (("dbias", dbias), ("dweight", dweight)):
        check(name, value, sum(part[name] for part in parts), torch.float32, 42, g.double().abs().sum())


@pytest.mark.parametrize(
    ("dtype", "momentum", "counts", "channels"),
    [
        *(
            (torch.float32, momentum, counts, 700)
            for momentum in (0.1, 0.9, 0.0, 1.0, None)
            for counts in (True, False)
        ),
        *((dtype, momentum, True, 3) for dtype in DTYPES[1:] for momentum in (0.1, None)),
    ],
    ids=str,
)
def test_running_statistics(dtype: torch.dtype, momentum: float | None, counts: bool, channels: int) -> None:
    def buffers() -> RunningStatistics:
        counter = torch.tensor(0, device=DEVICE) if counts else None
        ones = torch.ones(2, channels, dtype=dtype, device=DEVICE)
        return RunningStatistics(ones[0] * 0, ones[1].clone(), counter, momentum)

    ours, theirs = buffers(), buffers()
    for i, count in enumerate((392.0, 1.0, 0.0, 2.0, 392.0)):
        mean, m2 = randn(channels, seed=i, offset=3), randn(channels, seed=i + 5).abs() * count
        known = count if i % 2 else torch.tensor(count, dtype=torch.float64, device=DEVICE)
        version = ours.mean._version
        kernels.move_running(Moments(known, mean, m2), *ours[:4])
        assert ours.mean._version > version  # autograd is told
        core_running.update_running(theirs, Moments(count, mean, m2))
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            if a is None or b is None:
                assert a is b
            else:  # one rounding apart: torch's lerp is vectorised; the interpreter's bfloat16 is truncated
                eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
                torch.testing.assert_close(a, b, rtol=(i + 2) * eps, atol=eps)


class Operations(TorchDispatchMode):
    """Names of torch's operations that are neither views nor memory, which the fixture above makes by `full`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in (
            "full",
            "view",
            "empty",
            "new_empty",
            "detach",
            "unbind",
            "slice",
            "select",
            "squeeze",
            "unsqueeze",
        ):
            self.names.append(name)
        return func(*args, **kwargs or {})


def test_a_step_is_seven_kernels_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "stands_back", lambda x: False)  # as on a device
    monkeypatch.setattr(vectors, "_serves", lambda *arguments: False)
    names = []

    def record(kernel: Any, programs: int, first: Tensor, *arguments: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        with _disable_current_modes():
            _launch.launch(kernel, programs, first, *arguments, **options)

    monkeypatch.setattr(_batch, "launch", record)
    monkeypatch.setattr(_whole, "launch", record)
    layer = syncnorm.SyncBatchNorm2d(5, backend="triton", activation="relu").to(DEVICE)
    x, r, g = (randn(4, 5, 4, 6, dtype=torch.float32, seed=i) for i in range(3))
    leaves = [x.requires_grad_(), r.requires_grad_(), *layer.parameters()]
    with Operations() as seen:
        torch.autograd.grad(layer(x, residual=r), leaves, g)
    forward = ["moments_kernel", "finish_moments_kernel", "normalize_kernel", "update_running_kernel"]
    assert names == [*forward, "backward_reduce_kernel", "finish_sums_kernel", "backward_input_kernel"]
    assert seen.names == []


def test_who_moves_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "stands_back", lambda x: False)  # as on a device
    monkeypatch.setattr(vectors, "_serves", lambda *arguments: False)
    moved = []
    monkeypatch.setattr(kernels, "move_running", lambda *arguments: moved.append(arguments))
    batch = Moments(8.0, randn(5), randn(5).abs())
    table = torch.ones(5, 3, device=DEVICE)
    whole = RunningStatistics(table[:, 0].clone(), table[:, 1].clone(), torch.tensor(0, device=DEVICE), 0.25)
    vectors.update_running(whole, batch)
    vectors.update_running(whole, batch, "triton")
    assert len(moved) == 2
    vectors.update_running(whole, batch, "reference")  # somebody does not want triton
    vectors.update_running(whole._replace(mean=table[:, 0], var=table[:, 1]), batch)  # gaps
    vectors.update_running(whole._replace(skip_nonfinite=True), batch)
    assert len(moved) == 2 and int(whole.num_batches_tracked) == 3
    with pytest.raises(RuntimeError, match="size"):
        vectors.update_running(whole._replace(mean=torch.zeros(4, device=DEVICE)), batch)


def exact_batch_norm(
    x: Tensor, g: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, act: Activation | None
) -> dict[str, Tensor]:
    """torch's own functions in float64, on CPU where every one exists."""
    leaves = [t.double().cpu().detach().requires_grad_() for t in (x, weight, bias)]
    r = torch.zeros(x.shape, dtype=torch.float64) if residual is None else residual.double().cpu().detach()
    r.requires_grad_()
    pre = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, EPS) + r
    y = {
        "": lambda t: t, "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1), "silu": F.silu, "gelu": F.gelu
    }[act.name if act else ""](pre)  # fmt: skip
    grads = torch.autograd.grad(y, [*leaves, r], g.double().cpu())
    names = ("dx", "dweight", "dbias", "dresidual")
    return {"y": y.detach().to(DEVICE)} | {n: t.to(DEVICE) for n, t in zip(names, grads, strict=True)}


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
def test_affine_may_be_missing_and_vectors_may_have_gaps(channels_last: bool) -> None:
    x, x_hat = randn(6, 5, 3, offset=1), None
    moments = kernels.batch_moments(flat(x, channels_last))
    rstd = (moments.var + EPS).rsqrt()
    x_hat = F.batch_norm(x, None, None, None, None, True, 0.0, EPS)
    affine = randn(5, 2)
    weight, bias = affine.unbind(1)
    for w, b in ((None, bias), (weight, None), (None, None), (weight, bias)):
        y, _ = kernels.batch_normalize(flat(x, channels_last), moments.mean, rstd, w, b)
        exact = x_hat * (1 if w is None else w[:, None]) + (0 if b is None else b[:, None])
        check("y", y, flat(exact, channels_last), torch.float64)
    dx, _ = kernels.batch_backward_input(
        flat(x, channels_last), flat(x, channels_last), moments.mean, rstd, None, randn(5, seed=4).expand(2, -1)
    )  # fmt: skip
    m = randn(5, seed=4)[:, None]
    check("dx", dx, flat(rstd[:, None] * (x - m - x_hat * m), channels_last), torch.float64)


@triton.jit
def where_kernel(
    out, t, block, C, S, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row, col, _, _ = locate(t, block, C, S, 1, CHANNELS_LAST, ROWS, COLS)
    tl.store(out, row * (C if CHANNELS_LAST else S) + col)


def test_offsets_go_beyond_2_to_31() -> None:
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    c, s = 48, 1 << 27  # 6.4e9 values in a sample
    for t, block, expected in ((7 << 16, 2, (7 * c + 2 * 4) * s), ((7 << 16) + 5, 0, 7 * c * s + 5 * 2048)):
        where_kernel[(1,)](out, t, block, c, s, CHANNELS_LAST=False, ROWS=4, COLS=2048)
        assert out.item() == expected
    for t, block, expected in ((1 << 22, 1, (1 << 22) * 32 * c + 16), (5, 2 * 3, (2 * s + 5 * 32) * c)):
        where_kernel[(1,)](out, t, block, c, s, CHANNELS_LAST=True, ROWS=32, COLS=16)
        assert out.item() == expected


ROWS = [(3, 1), (17, 199), (2, 1023), (40, 64)]


@pytest.mark.parametrize(
    ("shape", "dtype", "with_residual", "part"),
    [
        *((shape, torch.float32, False, None) for shape in ROWS),
        *(((5, 199), dtype, True, None) for dtype in DTYPES),
        ((5, 199), torch.float32, False, 13),
    ],
    ids=str,
)
@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole rows", "pieces of rows"])
def test_row_norm_and_its_gradient(
    shape: tuple[int, int],
    dtype: torch.dtype,
    with_residual: bool,
    part: int | None,
    centre: bool,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if part and centre:
        return
    if not whole:
        for name, value in {"FORWARD_ROW": 0, "BACKWARD_ROW": 0, "ROW_CHUNK": 128, "TILES_PER_SPLIT": 1}.items():
            monkeypatch.setattr(_plan, name, value)
        monkeypatch.setattr(_plan, "TILE_BYTES", 1024)
    x, g, r, grad_h = (randn(*shape, dtype=dtype, seed=i, offset=i) for i in range(4))
    weight, bias = randn(2, shape[1], dtype=torch.float32, seed=5)
    residual, given = (r, grad_h) if with_residual else (None, None)
    y, h, mean, rstd = row_kernels.row_norm_forward(x, weight, bias, EPS, centre, residual, part)
    assert (h is not None) == with_residual and (mean is not None) == centre
    if h is not None:
        check("h", h, x.double() + r.double(), dtype)
    h = x if h is None else h
    dx, dweight, dbias = row_kernels.row_norm_backward(g, h, weight, mean, rstd, True, True, given, part)
    assert dweight is not None and dbias is not None
    leaves = [t.double().requires_grad_() for t in (h, weight, bias)]
    x64, w64, b64 = leaves
    used = x64[:, :part]
    d = x64 - x64.mean(1, keepdim=True) if centre else x64
    square = d.square().mean(1, keepdim=True) if part is None else used.square().mean(1, keepdim=True)
    exact = d / (square + EPS).sqrt() * w64 + b64
    exact_dx, exact_dw, exact_db = torch.autograd.grad(exact, leaves, g.double())
    exact_dx = exact_dx if given is None else exact_dx + given.double()
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    assert rstd.dtype == dweight.dtype == dbias.dtype == accumulate and y.dtype == dx.dtype == dtype
    size = float((rstd.max() * weight.abs().max() * g.abs().max()).double())
    check("y", y, exact.detach(), dtype, shape[1])
    check("dx", dx, exact_dx, dtype, shape[1], size)
    check("dweight", dweight, exact_dw, dtype, shape[0], g.double().abs().sum(0).max())
    check("dbias", dbias, exact_db, dtype, shape[0], g.double().abs().sum(0).max())
    only_dx = row_kernels.row_norm_backward(g, h, weight, mean, rstd, False, False, given, part)
    assert torch.equal(only_dx[0], dx) and only_dx[1:] == (None, None)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "activation"),
    [
        ((2, 12, 35), 3, torch.float32, "silu"),
        ((2, 12, 35), 3, torch.bfloat16, "silu"),
        ((2, 12, 35), 12, torch.float16, ""),
        ((3, 6, 8), 1, torch.float64, "gelu"),
        ((1, 66, 3), 33, torch.float32, "relu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.usefixtures("_small_tiles")
def test_group_norm_and_its_gradient(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, activation: str, channels_last: bool
) -> None:
    act = Activation(activation) if activation else None
    x, g = (randn(*shape, dtype=dtype, seed=i, scale=2, offset=i) for i in range(2))
    weight, bias = randn(2, shape[1], dtype=torch.float32, seed=3)
    if channels_last:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    leaves = [t.double().cpu().requires_grad_() for t in (x, weight, bias)]
    pre = F.group_norm(leaves[0], groups, leaves[1], leaves[2], EPS)
    exact = pre if act is None else {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation](pre)
    exact_grads = [t.to(DEVICE) for t in torch.autograd.grad(exact, leaves, g.double().cpu())]

    y, mean, rstd = row_kernels.group_norm_forward(x, groups, weight, bias, EPS, act)
    dx, dweight, dbias = row_kernels.group_norm_backward(g, x, groups, weight, bias, mean, rstd, act)
    assert y.stride() == dx.stride() == x.stride()
    assert mean.shape == rstd.shape == (shape[0], groups)
    terms = shape[1] // groups * shape[2]
    size = float((rstd.max() * weight.abs().max() * g.abs().max()).double())
    check("y", y, exact.detach().to(DEVICE), dtype, terms)
    check("dx", dx, exact_grads[0], dtype, terms, size)
    for name, value, gradient in (("dweight", dweight, exact_grads[1]), ("dbias", dbias, exact_grads[2])):
        check(name, value, gradient, dtype, shape[0] * shape[2], g.double().abs().sum((0, 2)).max())


def results(layer: torch.nn.Module, x: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """Output, gradients, gradients of a gradient penalty, and buffers of a training step."""
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    if residual is not None:
        leaves.append(residual.clone().requires_grad_())
    y = layer(leaves[0]) if residual is None else layer(leaves[0], residual=leaves[-1])
    y = y[0] + 2 * y[1] if isinstance(y, tuple) else y
    first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves, allow_unused=True)
    return [y, *first, *(t for t in second if t is not None), *layer.buffers()]


@pytest.mark.parametrize(
    ("build", "with_residual"),
    [
        (lambda backend: syncnorm.SyncBatchNorm2d(5, backend=backend), False),
        (lambda backend: syncnorm.SyncBatchNorm2d(5, backend=backend, activation="relu"), True),
        (lambda backend: syncnorm.SyncBatchNorm2d(5, backend=backend, activation="gelu"), True),
        (lambda backend: syncnorm.modules.BatchRenorm2d(5, backend=backend), False),
        (lambda backend: syncnorm.modules.LayerNorm(5, channel_dim=1, backend=backend), False),
        (lambda backend: syncnorm.modules.RMSNorm(6, eps=1e-5, backend=backend), True),
        (lambda backend: syncnorm.modules.GroupNorm(5, 1, activation="silu", backend=backend), False),
    ],
    ids=["batch", "batch add relu", "batch add gelu", "renorm", "layer", "add rms", "group silu"],
)
def test_layers_equal_the_reference_twice_differentiated(
    build: Callable[[str], torch.nn.Module], with_residual: bool
) -> None:
    x, r = randn(3, 5, 4, 6, offset=1), randn(3, 5, 4, 6, seed=1)
    found = []
    for backend in ("reference", "triton"):
        layer = build(backend).to(DEVICE, torch.float64)
        for i, parameter in enumerate(layer.parameters()):
            parameter.data.copy_(randn(*parameter.shape, seed=i + 7))
        found.append(results(layer, x, r if with_residual else None))
    assert len(found[0]) == len(found[1])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "build",
    [
        lambda: syncnorm.SyncBatchNorm2d(5, backend="triton", activation="relu"),
        lambda: syncnorm.modules.GroupNorm(5, 1, activation="silu", backend="triton"),
        lambda: syncnorm.modules.RMSNorm(6, eps=1e-5, backend="triton"),
    ],
    ids=["batch relu", "group silu", "rms"],
)
def test_compiled_in_one_graph_when_asked_for_by_name(build: Callable[[], torch.nn.Module]) -> None:
    torch._dynamo.reset()
    x = randn(3, 5, 4, 6, offset=1).requires_grad_()
    outcomes = []
    for compiled in (False, True):
        layer = build().to(DEVICE, torch.float64)
        if compiled:
            layer.compile(fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
        y = layer(x)
        outcomes.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()]), *layer.buffers()])
    for eager, traced in zip(*outcomes, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-10)
