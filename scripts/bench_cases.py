"""What ``scripts/bench.py`` times in one process, and how it times anything."""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import syncnorm
from syncnorm.cli._console import progress
from syncnorm.diagnostics import _timing as timing
from syncnorm.diagnostics._timing import Times, refuse_if_wrong, serving, spread, step, tensor, walk

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (8, 1024, 7, 7)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Row = dict[str, Any]
Layer = Callable[..., Tensor]


def layer_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward of the walk in a group of one against ``nn.BatchNorm2d``, by backend."""
    for threads, dtype, shape, layout in _grid(arguments):
        x, grad = (tensor(shape, dtype, LAYOUTS[layout]) for _ in range(2))
        steps = {"torch": step(nn.BatchNorm2d(shape[1]), x, grad)}
        for backend in arguments.backend or serving(dtype, reference=False):
            steps[backend] = step(walk(shape[1], backend), x, grad)
            refuse_if_wrong(steps["torch"](), steps[backend](), x, grad)
        y = torch.empty_like(x)
        times = interleave({"copy": lambda x=x, y=y: y.copy_(x), **steps}, arguments.rounds)
        moved = 2 * x.numel() * x.element_size()
        copy = statistics.median(times["copy"])
        best = next(name for name in steps if name != "torch")
        yield {
            **_what(threads, dtype, shape, layout),
            "torch µs": f"{statistics.median(times['torch']) * 1e6:.0f}",
            **{name: str(spread(times, name, "torch")) for name in steps if name != "torch"},
            f"copies, {best}": f"{statistics.median(times[best]) / copy:.1f}",
            "copy GB/s": f"{moved / copy / 1e9:.1f}",
        }


def fused_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """BN+ReLU and BN+add+ReLU within the layer against three layers of torch, and against peers that are installed."""
    for threads, dtype, shape, layout in _grid(arguments):
        x, residual, grad = (tensor(shape, dtype, LAYOUTS[layout]) for _ in range(3))
        backend = (arguments.backend or serving(dtype))[0]
        for name, second in (("BN+ReLU", None), ("BN+add+ReLU", residual), ("BN+leaky_relu, y kept", None)):
            leaky = "leaky" in name
            theirs = nn.BatchNorm2d(shape[1])
            fused = walk(shape[1], backend, activation="leaky_relu" if leaky else "relu", memory_efficient=leaky)
            act, act_ = (
                (functional.leaky_relu, functional.leaky_relu_) if leaky else (functional.relu, functional.relu_)
            )

            def composed(x: Tensor, second: Tensor | None = None, norm: nn.Module = theirs, act: Any = act) -> Tensor:
                y = norm(x)
                return act(y if second is None else y + second)

            def in_place(x: Tensor, second: Tensor | None = None, norm: nn.Module = theirs, act_: Any = act_) -> Tensor:
                y = norm(x)
                return act_(y if second is None else y.add_(second))

            steps = {
                layer: step(run, x, grad, second)
                for layer, run in (("torch", composed), ("in place", in_place), (backend, fused))
            }
            if arguments.compile:
                torch.compiler.reset()  # or the limit of recompilations makes the later rows eager
                steps["torch.compile"] = step(torch.compile(composed), x, grad, second)
            if leaky and dtype == torch.float32 and importlib.util.find_spec("inplace_abn"):
                from inplace_abn import InPlaceABN

                peer = InPlaceABN(shape[1], activation_param=0.01)
                # It writes over its input, which here is a leaf, so it gets a copy: one of about six passes of its own.
                steps["inplace-abn"] = step(lambda x, peer=peer: peer(x.clone()), x, grad)
            times = interleave(steps, arguments.rounds)
            yield {
                **_what(threads, dtype, shape, layout),
                "layers": name,
                "torch µs": f"{statistics.median(times['torch']) * 1e6:.0f}",
                "backend": backend,
                "ours": str(spread(times, backend, "torch")),
                "ours / torch in place": str(spread(times, backend, "in place")),
                "compiled torch": str(spread(times, "torch.compile", "torch")) if arguments.compile else "–",
                "inplace-abn": str(spread(times, "inplace-abn", "torch")) if "inplace-abn" in times else "–",
            }


def row_norm_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Layer, RMS and group norm against torch's."""
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in arguments.dtypes:
            for rows, width in ((4096, 1024), (1024, 4096)):
                x, grad = (torch.randn(rows, width).to(dtype) for _ in range(2))
                weight = nn.Parameter(torch.ones(width, dtype=dtype))
                bias = nn.Parameter(torch.zeros(width, dtype=dtype))
                rms, layer = syncnorm.RMSNorm(width, dtype=dtype), syncnorm.LayerNorm(width, dtype=dtype)
                times = interleave(
                    {
                        "F.rms_norm": step(lambda x, w=weight, n=width: functional.rms_norm(x, (n,), w), x, grad),
                        "F.layer_norm": step(
                            lambda x, w=weight, b=bias, n=width: functional.layer_norm(x, (n,), w, b), x, grad
                        ),
                        "RMSNorm": step(rms, x, grad),
                        "LayerNorm": step(layer, x, grad),
                    },
                    arguments.rounds,
                )
                for name, peer in (
                    ("RMSNorm", "F.rms_norm"),
                    ("RMSNorm", "F.layer_norm"),
                    ("LayerNorm", "F.layer_norm"),
                ):
                    yield {
                        "threads": threads, "dtype": _name(dtype), "shape": f"({rows}, {width})", "layout": "",
                        "ours": name, "against": peer,
                        "torch µs": f"{statistics.median(times[peer]) * 1e6:.0f}", "ratio": str(spread(times, name, peer)),
                    }  # fmt: skip
            for shape in arguments.shapes:
                for layout, memory_format in LAYOUTS.items():
                    x, grad = (tensor(shape, dtype, memory_format) for _ in range(2))
                    channels = shape[1]
                    for name, layer, peers in (
                        (
                            "GroupNorm-32", syncnorm.GroupNorm(channels, 32, dtype=dtype),
                            {"F.group_norm": nn.GroupNorm(32, channels, dtype=dtype)},
                        ),
                        (
                            "LayerNorm over channels", syncnorm.LayerNorm(channels, channel_dim=1, dtype=dtype),
                            _over_channels(channels, dtype),
                        ),
                    ):  # fmt: skip
                        steps = {key: step(run, x, grad) for key, run in {**peers, name: layer}.items()}
                        times = interleave(steps, max(arguments.rounds // 3, 5))
                        for peer in peers:
                            yield {
                                "threads": threads, "dtype": _name(dtype), "shape": str(shape), "layout": layout,
                                "ours": name, "against": peer,
                                "torch µs": f"{statistics.median(times[peer]) * 1e6:.0f}",
                                "ratio": str(spread(times, name, peer)),
                            }  # fmt: skip


def _over_channels(channels: int, dtype: torch.dtype) -> dict[str, Layer]:
    """Layer norm over the channels of ``[N, C, H, W]`` as others write it, and a batch norm to compare with."""
    weight, bias = (nn.Parameter(torch.full((channels,), value, dtype=dtype)) for value in (1.0, 0.0))

    def permuted(x: Tensor) -> Tensor:  # timm's LayerNorm2d
        return functional.layer_norm(x.permute(0, 2, 3, 1), (channels,), weight, bias).permute(0, 3, 1, 2)

    def spelled_out(x: Tensor) -> Tensor:  # that of the authors of ConvNeXt
        d = x - x.mean(1, keepdim=True)
        x_hat = d / torch.sqrt(d.pow(2).mean(1, keepdim=True) + 1e-5)
        return weight[:, None, None] * x_hat + bias[:, None, None]

    return {
        "F.layer_norm, permuted": permuted,
        "means of torch": spelled_out,
        "nn.BatchNorm2d": nn.BatchNorm2d(channels, dtype=dtype),
    }


def eval_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """The module against ``F.batch_norm``: evaluation, and training without a process group."""
    for threads, dtype, shape, layout in _grid(arguments):
        for mode in ("eval", "train, one process"):
            x = tensor(shape, dtype, LAYOUTS[layout])
            layer = syncnorm.SyncBatchNorm2d(shape[1]).train(mode != "eval")
            buffers = [layer.running_mean.clone(), layer.running_var.clone()]

            def theirs(x: Tensor = x, layer: nn.BatchNorm2d = layer, buffers: list[Tensor] = buffers) -> Tensor:
                affine = layer.weight, layer.bias
                return functional.batch_norm(x, *buffers, *affine, layer.training, 0.1, layer.eps)

            with torch.no_grad():
                if not torch.equal(theirs(), layer(x)):
                    raise SystemExit(f"not timed: {mode} differs from F.batch_norm at {shape}")
                times = interleave({"torch": theirs, "ours": lambda x=x, layer=layer: layer(x)}, arguments.rounds)
            extra = statistics.median(times["ours"]) - statistics.median(times["torch"])
            yield {
                **_what(threads, dtype, shape, layout),
                "mode": mode,
                "F.batch_norm µs": f"{statistics.median(times['torch']) * 1e6:.0f}",
                "ratio": spread(times, "ours", "torch").text(3),
                "difference µs": f"{extra * 1e6:.1f}",
            }


def memory_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """What autograd keeps, with a convolution behind, which keeps its own input; in sizes of the input."""
    x, residual = (torch.randn(8, 64, 28, 28, requires_grad=True) for _ in range(2))
    cases: dict[str, tuple[Layer, Layer, list[Tensor]]] = {}
    norm = nn.BatchNorm2d(64)
    for name in ("relu", "leaky_relu", "silu", "gelu"):
        function = getattr(functional, name)
        cases[f"BN+{name}"] = (lambda x, f=function: f(norm(x)), _sync(activation=name), [x])
        cases[f"BN+add+{name}"] = (lambda x, r, f=function: f(norm(x) + r), _sync(activation=name), [x, residual])
    cases["BN+leaky_relu, memory_efficient"] = (
        *cases["BN+leaky_relu"][:1],
        _sync(activation="leaky_relu", memory_efficient=True),
        [x],
    )
    cases["BN, memory_efficient"] = (norm, _sync(memory_efficient=True), [x])
    conv = nn.Conv2d(64, 8, 1)
    for name, (theirs, ours, inputs) in cases.items():
        yield {
            "layers": f"{name}, then a convolution",
            "torch": f"{saved(lambda *t, f=theirs: conv(f(*t)), inputs) / x.nbytes:.2f}",
            "ours": f"{saved(lambda *t, f=ours: conv(f(*t)), inputs) / x.nbytes:.2f}",
        }


def saved(layer: Layer, inputs: list[Tensor]) -> int:
    """Bytes of distinct memory that autograd keeps for a backward through ``layer``, parameters included."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(*inputs)  # alive until here: its memory must not be given to something else
    del y
    return sum(kept.values())


def interleave(cases: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Seconds per call: every case once a round, with a count of the rounds on a terminal."""
    with progress("  round", rounds + 2) as advance:
        return timing.interleave(cases, rounds, advance)


def _sync(**options: Any) -> nn.Module:
    return syncnorm.SyncBatchNorm2d(64, **options)


def _grid(arguments: argparse.Namespace) -> Iterator[tuple[int, torch.dtype, tuple[int, ...], str]]:
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in arguments.dtypes:
            for shape in arguments.shapes:
                for layout in LAYOUTS:
                    yield threads, dtype, shape, layout


def _what(threads: int, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> Row:
    return {"threads": threads, "dtype": _name(dtype), "shape": str(shape), "layout": layout}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
