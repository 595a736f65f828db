"""Tier: no process and gloo ranks. Gradients, however they are asked for: twice, through torch.func, in any layout."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vjp
from torch.utils._python_dispatch import TorchDispatchMode

import syncnorm
from syncnorm.distributed import agreement
from syncnorm.functional import _whole, sync_batch_norm
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import my_slice, randomise_affine, whole_batch

# Relative to the largest value, float64, sums of at most 200 values.
BOUND = 1e-12


def _part(splits: list[int]) -> slice:
    return my_slice(splits) if dist.is_initialized() else slice(None)


def _relative(mine: Tensor, exact: Tensor, whole: Tensor | None = None) -> float:
    scale = float((exact if whole is None else whole).detach().abs().max().clamp(min=1)) if exact.numel() else 1.0
    assert mine.shape == exact.shape
    return float((mine.detach() - exact.detach()).abs().max()) / scale if mine.numel() else 0.0


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def _layer(num_features: int = 3, **options: Any) -> syncnorm.SyncBatchNorm:
    layer = syncnorm.SyncBatchNorm(num_features, dtype=torch.float64, **options)
    randomise_affine(layer)
    return layer


# ------------------------------------------------------------------------------------------------- against finite differences


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 3), (2, 2, 1, 3), (2, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
def test_first_and_second_derivative_equal_finite_differences(
    backend: str, shape: tuple[int, ...], affine: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    vectors = torch.randn(2, shape[1], generator=generator, dtype=torch.float64).unbind(0)
    inputs = [x, *vectors[: {"weight and bias": 2, "weight": 1, "none": 0}[affine]]]
    inputs = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]

    def normalise(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return sync_batch_norm(x, None, None, weight, bias, True, eps=0.1, backend=backend)

    assert gradcheck(normalise, inputs)
    assert gradgradcheck(normalise, inputs)


# -------------------------------------------------------------------------------------------------------- over the ranks


def _per_rank_cotangents(splits: list[int]) -> float:
    # A penalty on the parameter gradients sees only this rank's share of them, and weighs it as it likes. In one process:
    # a copy of the affine parameters for each rank.
    x, loss_weight = whole_batch((sum(splits), 3, 5))
    numbers = torch.arange(len(splits)).repeat_interleave(torch.tensor(splits))
    rank, part = dist.get_rank(), _part(splits)
    layer = _layer()
    whole = x.clone().requires_grad_()
    copies = [p.detach().repeat(len(splits), 1).requires_grad_() for p in (layer.weight, layer.bias)]
    x_hat = nn.functional.batch_norm(whole, None, None, training=True)
    y = x_hat * copies[0][numbers].unsqueeze(-1) + copies[1][numbers].unsqueeze(-1)
    dx, dw, db = torch.autograd.grad((y.pow(3) * loss_weight).sum(), [whole, *copies], create_graph=True)
    scale = torch.arange(1.0, len(splits) + 1, dtype=torch.float64).unsqueeze(-1)
    penalty = dx.square().sum() + (scale * dw.pow(2)).sum() + (dw * db / scale).sum()
    exact = torch.autograd.grad(penalty, [whole, *copies])

    mine = x[part].clone().requires_grad_()
    loss = (layer(mine).pow(3) * loss_weight[part]).sum()
    dx, dw, db = torch.autograd.grad(loss, [mine, layer.weight, layer.bias], create_graph=True)
    penalty = dx.square().sum() + (scale[rank] * dw.pow(2)).sum() + (dw * db / scale[rank]).sum()
    got = torch.autograd.grad(penalty, [mine, layer.weight, layer.bias])
    # Each rank's own share of dγ is what the formulas leave open; DDP adds the shares up.
    errors = [_relative(got[0], exact[0][part], exact[0])]
    errors += [_relative(_summed(a), b.sum(0)) for a, b in zip(got[1:], exact[1:], strict=True)]
    return max(errors)


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[3, 2], [4, 0, 1]], ids=str)
def test_second_derivative_with_another_cotangent_on_each_rank(splits: list[int]) -> None:
    assert max(run_ranks(_per_rank_cotangents, len(splits), splits)) <= BOUND


def _torch_func(splits: list[int]) -> dict[str, float]:
    x, loss_weight = whole_batch((sum(splits), 3, 5))
    part, out = _part(splits), {}
    for backend in ("auto", "aten"):
        layer = _layer(backend=backend)
        # Torch's own layer cannot write its statistics inside a transform: they are compared with an ordinary forward's.
        theirs = nn.BatchNorm1d(3, dtype=torch.float64, track_running_stats=False)
        theirs.load_state_dict(dict(layer.named_parameters()))
        tracked = nn.BatchNorm1d(3, dtype=torch.float64)
        tracked(x)

        def loss(parameters: dict[str, Tensor], x: Tensor, weight: Tensor, module: nn.Module) -> Tensor:
            return (functional_call(module, parameters, (x,)).pow(3) * weight).sum()

        exact = grad(loss, argnums=(0, 1))(dict(theirs.named_parameters()), x, loss_weight, theirs)
        mine = grad(loss, argnums=(0, 1))(dict(layer.named_parameters()), x[part], loss_weight[part], layer)
        out[f"{backend} grad x"] = _relative(mine[1], exact[1][part], exact[1])
        for name in exact[0]:
            out[f"{backend} grad {name}"] = _relative(_summed(mine[0][name]), exact[0][name])
        for name, buffer in tracked.named_buffers():
            out[f"{backend} {name}"] = _relative(layer.get_buffer(name).double(), buffer.double())

        def penalty(x: Tensor, weight: Tensor, module: nn.Module, loss: Callable[..., Tensor] = loss) -> Tensor:
            return grad(loss, argnums=1)(dict(module.named_parameters()), x, weight, module).square().sum()

        exact_2 = grad(penalty)(x, loss_weight, theirs)
        out[f"{backend} grad grad"] = _relative(
            grad(penalty)(x[part], loss_weight[part], layer), exact_2[part], exact_2
        )

        exact_y, exact_pull = vjp(theirs, x)
        y, pull = vjp(layer, x[part])
        out[f"{backend} vjp y"] = _relative(y, exact_y[part], exact_y)
        (exact_dx,) = exact_pull(loss_weight)
        out[f"{backend} vjp x"] = _relative(pull(loss_weight[part])[0], exact_dx[part], exact_dx)
    return out


@pytest.mark.gloo
def test_torch_func_gives_the_gradients_of_the_whole_batch() -> None:
    for out in [_torch_func([5]), *run_ranks(_torch_func, 2, [3, 2]), *run_ranks(_torch_func, 2, [0, 4])]:
        assert max(out.values()) <= BOUND, out


def _ways_to_backward(splits: list[int]) -> dict[str, float]:
    x, loss_weight = whole_batch((sum(splits), 3, 5))
    part, out = _part(splits), {}

    def both(run: Callable[[nn.Module, Tensor, Tensor], None], name: str, **options: Any) -> tuple[nn.Module, Tensor]:
        layer, theirs = _layer(backend="auto", **options), nn.BatchNorm1d(3, dtype=torch.float64, **options)
        theirs.load_state_dict(layer.state_dict())
        leaves = [x[part].clone().requires_grad_(), x.clone().requires_grad_()]
        run(layer, leaves[0], loss_weight[part])
        run(theirs, leaves[1], loss_weight)
        out[f"{name} dx"] = _relative(leaves[0].grad, leaves[1].grad[part], leaves[1].grad)
        for (key, mine), exact in zip(layer.named_parameters(), theirs.parameters(), strict=True):
            out[f"{name} {key}"] = _relative(_summed(mine.grad), exact.grad)
        for (key, mine), exact in zip(layer.named_buffers(), theirs.buffers(), strict=True):
            out[f"{name} {key}"] = _relative(mine.double(), exact.double())
        return layer, leaves[0]

    def two_forwards(layer: nn.Module, x: Tensor, weight: Tensor) -> None:
        (layer(x) * layer(x.square()).pow(3) * weight).sum().backward()

    both(two_forwards, "two forwards")

    def in_turn(layer: nn.Module, x: Tensor, weight: Tensor) -> None:  # backward of the first call first
        first, second = layer(x), layer(x.sin())
        (first.pow(3) * weight).sum().backward()
        (second.pow(3) * weight).sum().backward()

    both(in_turn, "in turn")

    def cube(layer: nn.Module, x: Tensor, weight: Tensor) -> None:
        (layer(x).pow(3) * weight).sum().backward()

    _, once = both(cube, "once")

    def twice(layer: nn.Module, x: Tensor, weight: Tensor) -> None:
        loss = (layer(x).pow(3) * weight).sum()
        loss.backward(retain_graph=True)
        kept = [x.grad.clone(), *[p.grad.clone() for p in layer.parameters()]]
        loss.backward()
        assert all(
            torch.equal(2 * a, b) for a, b in zip(kept, [x.grad, *[p.grad for p in layer.parameters()]], strict=True)
        )

    _, doubled = both(twice, "retain_graph")
    assert torch.equal(2 * once.grad, doubled.grad)

    def into(layer: nn.Module, x: Tensor, weight: Tensor) -> None:  # ReLU(inplace=True) writes into our output
        (nn.functional.relu(layer(x), inplace=True).pow(3) * weight).sum().backward()

    both(into, "inplace after")
    return out


@pytest.mark.gloo
def test_backward_in_any_order_and_number_equals_the_whole_batch() -> None:
    for out in [
        _ways_to_backward([5]),
        *run_ranks(_ways_to_backward, 2, [3, 2]),
        *run_ranks(_ways_to_backward, 2, [4, 0]),
    ]:
        assert max(out.values()) <= BOUND, out


def _grad_layouts(splits: list[int]) -> float:
    x, loss_weight = whole_batch((sum(splits), 3, 4, 5))
    part, worst = _part(splits), 0.0
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    per_sample, per_channel = loss_weight[:, 0, 0, 0], loss_weight[0, :, 0, 0]
    losses: dict[str, Callable[[Tensor, slice], Tensor]] = {
        "sum": lambda y, _: y.sum(),  # one number, expanded over everything
        "per sample": lambda y, part: (y.sum((1, 2, 3)) * per_sample[part]).sum(),
        "per channel": lambda y, _: (y.sum((0, 2, 3)) * per_channel).sum(),
        "transposed": lambda y, part: (y.transpose(0, 3) * loss_weight[part].transpose(0, 3).contiguous()).sum(),
        "channels last": lambda y, part: (
            y.to(memory_format=torch.channels_last)
            * loss_weight[part].contiguous(memory_format=torch.channels_last)
        ).sum(),
        "half of it": lambda y, part: (y[:, :, ::2] * loss_weight[part][:, :, ::2]).sum(),
    }  # fmt: skip
    for backend in ("auto", "aten", "reference"):
        for layout in formats.values():
            for loss in losses.values():
                layer = _layer(backend=backend)
                theirs = nn.BatchNorm2d(3, dtype=torch.float64)
                theirs.load_state_dict(layer.state_dict())
                leaf, whole = x[part].contiguous(memory_format=layout).requires_grad_(), x.clone().requires_grad_()
                loss(layer(leaf), part).backward()
                loss(theirs(whole), slice(None)).backward()
                worst = max(worst, _relative(leaf.grad, whole.grad[part], whole.grad))
                for mine, exact in zip(layer.parameters(), theirs.parameters(), strict=True):
                    worst = max(worst, _relative(_summed(mine.grad), exact.grad))
                if leaf.numel():
                    assert leaf.grad.stride() == leaf.stride()
    return worst


@pytest.mark.gloo
def test_the_layout_of_the_output_gradient_does_not_matter() -> None:
    assert _grad_layouts([5]) <= BOUND
    assert max(run_ranks(_grad_layouts, 2, [3, 2])) <= BOUND
    assert max(run_ranks(_grad_layouts, 2, [4, 0])) <= BOUND


# -------------------------------------------------------------------------------------------------------- what has no grad


def _frozen(splits: list[int]) -> dict[str, Any]:
    x, loss_weight = whole_batch((sum(splits), 3, 5))
    part, out = _part(splits), {}
    for needs in ([True, False, False], [False, True, True], [False, True, False], [True, False, True]):
        layer, theirs = _layer(), nn.BatchNorm1d(3, dtype=torch.float64)
        theirs.load_state_dict(layer.state_dict())
        for module in (layer, theirs):
            module.weight.requires_grad_(needs[1]), module.bias.requires_grad_(needs[2])
        leaf, whole = x[part].clone().requires_grad_(needs[0]), x.clone().requires_grad_(needs[0])
        y = layer(leaf)
        (theirs(whole).pow(3) * loss_weight).sum().backward()
        with count_collectives() as counts:
            (y.pow(3) * loss_weight[part]).sum().backward()
        errors = [_relative(_summed(a.grad), b.grad) for a, b in zip(layer.parameters(), theirs.parameters(), strict=True)
                  if b.grad is not None]  # fmt: skip
        assert [p.grad is None for p in layer.parameters()] == [p.grad is None for p in theirs.parameters()]
        assert (leaf.grad is None) == (whole.grad is None)
        if needs[0]:
            errors.append(_relative(leaf.grad, whole.grad[part], whole.grad))
        out[str(needs)] = max(errors), counts
    return out


@pytest.mark.gloo
def test_frozen_parameters_and_inputs_get_none_and_change_nothing_else() -> None:
    for error, _ in _frozen([5]).values():
        assert error <= BOUND
    for splits in ([3, 2], [0, 4]):
        first, second = run_ranks(_frozen, 2, splits)
        for name in first:
            assert max(first[name][0], second[name][0]) <= BOUND, name
            assert first[name][1] == second[name][1] == {"all_reduce": 1}, name  # alike on all ranks


def _some_ranks_only() -> list[float]:
    # On rank 1 the input needs no gradient, the parameters do on both: each still meets the other in backward.
    x, loss_weight = whole_batch((5, 3, 5))
    part = _part([3, 2])
    layer, theirs = _layer(), nn.BatchNorm1d(3, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    leaf, whole = x[part].clone().requires_grad_(dist.get_rank() == 0), x.clone().requires_grad_()
    (layer(leaf).pow(3) * loss_weight[part]).sum().backward()
    (theirs(whole).pow(3) * loss_weight).sum().backward()
    errors = [_relative(_summed(a.grad), b.grad) for a, b in zip(layer.parameters(), theirs.parameters(), strict=True)]
    if leaf.grad is not None:
        errors.append(_relative(leaf.grad, whole.grad[part], whole.grad))
    return errors


@pytest.mark.gloo
def test_ranks_whose_inputs_differ_in_requires_grad_still_meet() -> None:
    for errors in run_ranks(_some_ranks_only, 2):
        assert max(errors) <= BOUND


def _disagreement(how: str) -> tuple[str, bool, float]:
    layer = _layer(backend="auto")
    for parameter in layer.parameters():
        parameter.requires_grad_(how == "no_grad")
    x, other = torch.randn(4, 3, dtype=torch.float64), dist.get_rank() == 1
    x.requires_grad_(how == "no_grad" or not other)
    before = [b.clone() for b in layer.buffers()]
    with (
        pytest.raises(syncnorm.SyncNormMismatch) as caught,
        torch.no_grad() if other and how == "no_grad" else _nothing(),
    ):
        layer(x)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    # Nobody was left behind: the next step is an ordinary one.
    whole, loss_weight = whole_batch((5, 3))
    part = _part([3, 2])
    leaf, exact = whole[part].clone().requires_grad_(), whole.clone().requires_grad_()
    (layer(leaf).pow(3) * loss_weight[part]).sum().backward()
    theirs = nn.BatchNorm1d(3, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    (theirs(exact).pow(3) * loss_weight).sum().backward()
    return str(caught.value), unchanged, _relative(leaf.grad, exact.grad[part], exact.grad)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.gloo
@pytest.mark.parametrize("how", ["requires_grad", "no_grad"])
def test_ranks_that_disagree_on_a_backward_are_told_and_none_waits(how: str) -> None:
    for rank, (text, unchanged, error) in enumerate(run_ranks(_disagreement, 2, how, group_timeout=10)):
        assert "1 of 2 ranks need a backward pass through this call (ranks [0], at SyncBatchNorm (first met at" in text
        assert "C=3 float64) and ranks [1] do not" in text
        assert f"this rank {'does not' if rank else 'does'})" in text and "SyncBatchNorm(3)" in text
        assert "requires_grad" in text and "torch.no_grad()" in text
        assert unchanged and error <= BOUND


# ------------------------------------------------------------------------------------------------------------------ limits


def _third_derivative() -> str:
    layer = _layer(backend="aten")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(second.sum(), x)
    return str(caught.value)


@pytest.mark.gloo
def test_a_third_derivative_is_refused_in_words() -> None:
    for text in [_third_derivative(), *run_ranks(_third_derivative, 2)]:
        assert "first and second derivative" in text and "third" in text


# ------------------------------------------------------------------------------------------------------------ no host sync


class _NothingReadBack(TorchDispatchMode):
    """Fails where a value would be brought to the host, or a shape would depend on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "item", "masked_select")), func
        return func(*args, **(kwargs or {}))


class _OnDevice(Tensor):
    """Stands for a row on an accelerator: the layer may not look into it."""


def _reads_nothing_back(on_device: bool) -> None:
    if on_device:
        reduce = agreement.sum_row
        agreement.sum_row = lambda row, group: reduce(row, group).as_subclass(_OnDevice)
        _whole._among = lambda backend, x: None  # by which nothing goes that is on an accelerator
    for options in (
        {},
        {"momentum": None},
        {"accumulate": 2},
        {"backend": "reference"},
        {"track_running_stats": False},
    ):
        layer = _layer(**options)
        # An empty shard, too; but on an accelerator a rank with at most one value asks whether there is another.
        for num_samples in (4, 3 if on_device else 3 * dist.get_rank()):
            x = torch.randn(num_samples, 3, 5, dtype=torch.float64, requires_grad=True)
            with _NothingReadBack():
                (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
                dx.square().sum().backward()


@pytest.mark.gloo
@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_reads_nothing_back_to_the_host(on_device: bool) -> None:
    run_ranks(_reads_nothing_back, 2, on_device)
    with pytest.raises(AssertionError), _NothingReadBack():  # the mode can fail
        torch.ones(1).item()
