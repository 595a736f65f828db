"""Tier: gloo ranks. Ghost batch norm: each ghost is torch's layer on its samples, below and above the batch of a rank."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.modules import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, SyncBatchNorm, SyncBatchNorm2d
from syncnorm.modules._ghost_batch_norm import GhostBatchNorm
from syncnorm.testing import count_collectives, run_ranks
from tests.oracles import errors, my_slice, randomise_affine, results, whole_batch


class Ghosts(nn.BatchNorm2d):
    """Ghosts of given sizes, each through torch's own batch norm; running statistics are the weighted averages."""

    def __init__(self, num_features: int, sizes: list[int], **options: Any) -> None:
        super().__init__(num_features, **options)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes)
        dims = [d for d in range(x.dim()) if d != 1]
        with torch.no_grad():
            share = [len(part) / len(x) for part in parts]
            mean = sum(s * part.mean(dims) for s, part in zip(share, parts, strict=True))
            var = sum(s * part.var(dims, correction=1) for s, part in zip(share, parts, strict=True))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            self.num_batches_tracked += 1
        whole = [nn.functional.batch_norm(p, None, None, self.weight, self.bias, True, 0.0, self.eps) for p in parts]
        return torch.cat(whole)


def pair(virtual_batch_size: int, sizes: list[int], make: Any = GhostBatchNorm2d) -> tuple[nn.Module, Ghosts]:
    theirs = Ghosts(3, sizes, dtype=torch.float64)
    randomise_affine(theirs)
    ours = make(3, virtual_batch_size=virtual_batch_size, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    ("samples", "size", "sizes"), [(8, 4, [4, 4]), (9, 4, [4, 4, 1]), (7, 2, [2, 2, 2, 1]), (5, 8, [5])]
)
def test_one_process_equals_torch_on_each_ghost(samples: int, size: int, sizes: list[int]) -> None:
    ours, theirs = pair(size, sizes)
    x, loss_weight = whole_batch((16, 3, 4, 5))
    ours(x)  # the first batch is larger: ghosts are cut
    ours.load_state_dict(theirs.state_dict())
    x, loss_weight = x[:samples], loss_weight[:samples]
    exact, mine = results(theirs, x, loss_weight), results(ours, x, loss_weight)
    for name in exact:
        scale = max(float(exact[name].abs().max()), 1.0)
        assert float((mine[name] - exact[name]).abs().max()) <= 1e-12 * scale, name


def test_a_last_ghost_of_one_value_joins_the_one_before() -> None:
    layer = GhostBatchNorm1d(3, 4, affine=False, dtype=torch.float64)
    x = torch.randn(9, 3, dtype=torch.float64)
    y = layer(x)
    for part in (slice(0, 4), slice(4, 9)):
        exact = nn.functional.batch_norm(x[part], None, None, training=True)
        torch.testing.assert_close(y[part], exact, rtol=1e-12, atol=1e-12)


def _cut(splits: list[int]) -> dict[str, float]:
    part = my_slice(splits)
    sizes = [n for split in splits for n in ([4] * (split // 4) + ([split % 4] if split % 4 else []))]
    ours, theirs = pair(4, sizes)
    x, loss_weight = whole_batch((sum(splits), 3, 4, 5))
    exact = results(theirs, x, loss_weight, second_order=False)
    with count_collectives() as counts:
        mine = results(ours, x[part], loss_weight[part], second_order=False)
    assert counts == {"all_reduce": 2}  # who cuts, once; then one for the running statistics
    with count_collectives() as counts:
        results(ours, x[part], loss_weight[part], second_order=False)
    assert counts == {"all_reduce": 1}
    return errors(mine, exact, part)


@pytest.mark.gloo
@pytest.mark.parametrize("splits", [[8, 8], [8, 6], [8, 0, 3]], ids=str)
def test_ranks_cut_their_batches_and_share_running_statistics(splits: list[int]) -> None:
    for per_rank in run_ranks(_cut, len(splits), splits):
        assert max(per_rank.values()) <= 1e-12, per_rank


def _join(make: Any) -> dict[str, float]:
    part = my_slice([3, 3, 3, 3])
    ours, theirs = pair(6, [6, 6], make)
    x, loss_weight = whole_batch((12, 3, 4, 5))
    exact = results(theirs, x, loss_weight)
    worst = errors(results(ours, x[part], loss_weight[part]), exact, part)
    # The last batch of an epoch: smaller and uneven, and the same ranks stay together.
    theirs.sizes = [4, 3]
    ours.load_state_dict(theirs.state_dict())
    splits = [3, 1, 0, 3]
    x, loss_weight, part = x[:7], loss_weight[:7], my_slice(splits)
    exact = results(theirs, x, loss_weight, second_order=False)
    late = errors(results(ours, x[part], loss_weight[part], second_order=False), exact, part)
    return worst | {f"late {name}": error for name, error in late.items()}


@pytest.mark.gloo
@pytest.mark.parametrize("make", [GhostBatchNorm2d, SyncBatchNorm2d, SyncBatchNorm])
def test_ranks_are_joined_where_a_ghost_is_larger_than_a_batch(make: Any) -> None:
    for per_rank in run_ranks(_join, 4, make):
        assert max(per_rank.values()) <= 1e-12, per_rank


def _groups_of_two() -> dict[str, float]:
    part = my_slice([3, 3, 3, 3])
    ghosts = GhostBatchNorm2d(3, 6, dtype=torch.float64, process_group=1)  # this process alone, with everything
    randomise_affine(ghosts)
    groups = SyncBatchNorm2d(3, process_group=2, dtype=torch.float64)
    groups.load_state_dict(ghosts.state_dict())
    x, loss_weight = whole_batch((12, 3, 4, 5))
    exact = results(ghosts, x, loss_weight)
    mine = errors(results(groups, x[part], loss_weight[part]), exact, part)
    return {name: error for name, error in mine.items() if not name.startswith("running_")}


@pytest.mark.gloo
def test_batch_norm_over_groups_of_ranks_is_ghost_batch_norm_of_everything() -> None:
    for per_rank in run_ranks(_groups_of_two, 4):
        assert max(per_rank.values()) <= 1e-12, per_rank


def _misfits() -> list[str]:
    out = []
    for size, batch in ((5, 2), (6, 2), (4, 2 + dist.get_rank())):
        layer = GhostBatchNorm1d(2, size)
        try:
            layer(torch.randn(batch, 2))
            out.append("no error")
        except ValueError as error:
            out.append(str(error))
    return out


@pytest.mark.gloo
def test_sizes_that_neither_cut_nor_join_are_refused_on_every_rank() -> None:
    for odd, too_many, uneven in run_ranks(_misfits, 2):
        assert "virtual_batch_size=5 must be at most the batch of a rank, or a multiple of it that joins ranks" in odd
        assert "virtual_batch_size=6 joins 3 ranks of batch 2, which must divide the number of ranks, 2" in too_many
        assert "the ranks' batches are [2, 3]" in uneven


def _one_rank_refuses(size: int, tracked: bool, how: str) -> tuple[str, bool]:
    layer = GhostBatchNorm1d(3, size, track_running_stats=tracked)
    x = torch.randn(2, 3)
    layer(x)  # ranks have found out whether they are joined
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bad = dist.get_rank() == 0
    try:
        layer(torch.randn(2, 4) if bad and how == "input" else x, x[:1] if bad and how == "residual" else x)
        outcome = "nothing"
    except (ValueError, syncnorm.SyncNormError) as error:
        outcome = type(error).__name__
    same = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer(x)  # and still works
    return outcome, same


@pytest.mark.gloo
@pytest.mark.parametrize("how", ["input", "residual"])
@pytest.mark.parametrize(("size", "tracked"), [(2, True), (2, False), (4, True), (4, False)])
def test_a_refusal_on_one_rank_lets_nobody_wait(size: int, tracked: bool, how: str) -> None:
    # Those of the same ghost hear of it, and the others where all meet over the running statistics.
    told = 4 if tracked else size // 2
    per_rank = run_ranks(_one_rank_refuses, 4, size, tracked, how, timeout=30)
    wanted = ["ValueError"] + ["SyncNormMismatch"] * (told - 1) + ["nothing"] * (4 - told)
    assert per_rank == [(outcome, True) for outcome in wanted]


def test_one_process_refuses_a_ghost_larger_than_its_batch() -> None:
    with pytest.raises(ValueError, match=r"GhostBatchNorm1d\(2\): virtual_batch_size=8 must be at most the batch"):
        GhostBatchNorm1d(2, 8)(torch.randn(4, 2))
    with pytest.raises(ValueError, match="virtual_batch_size is a number of samples, at least 1; got 0"):
        GhostBatchNorm1d(2, 0)
    with pytest.raises(ValueError, match="virtual_batch_size=1 leaves one value per channel in a ghost"):
        GhostBatchNorm1d(2, 1)(torch.randn(4, 2))


@pytest.mark.parametrize("make", [SyncBatchNorm2d, SyncBatchNorm])
def test_the_knob_of_sync_batch_norm_makes_ghosts(make: Any) -> None:
    layer, theirs = pair(4, [4, 4, 1], make)
    x, loss_weight = whole_batch((9, 3, 4, 5))
    exact, mine = results(theirs, x, loss_weight), results(layer, x, loss_weight)
    for name in exact:
        torch.testing.assert_close(mine[name], exact[name], rtol=1e-12, atol=1e-12, msg=name)
    assert isinstance(layer, make)
    assert isinstance(layer, GhostBatchNorm2d if make is SyncBatchNorm2d else GhostBatchNorm)
    assert layer.settings() == {"process_group": "world", "backend": "auto", "accumulate": 1, "virtual_batch_size": 4}
    whole = syncnorm.convert(nn.Sequential(layer))[0]  # and back: all samples again
    assert type(whole) is make
    assert "virtual_batch_size" not in vars(whole)
    plain = make(3, virtual_batch_size=None, dtype=torch.float64)
    torch.testing.assert_close(plain(x), nn.functional.batch_norm(x, None, None, training=True), rtol=1e-12, atol=1e-12)


def test_the_knob_refuses_what_it_cannot_mean() -> None:
    class Own(SyncBatchNorm2d):
        pass

    with pytest.raises(ValueError, match="virtual_batch_size=4 and accumulate=2 exclude each other"):
        SyncBatchNorm2d(3, virtual_batch_size=4, accumulate=2)
    with pytest.raises(ValueError, match="virtual_batch_size=4 and memory_efficient=True exclude each other"):
        SyncBatchNorm2d(3, virtual_batch_size=4, memory_efficient=True)
    with pytest.raises(ValueError, match="virtual_batch_size is a number of samples, at least 1; got 0"):
        SyncBatchNorm2d(3, virtual_batch_size=0)
    with pytest.raises(TypeError, match=r"not a Own\. Subclass .*'GhostBatchNorm2d'"):
        Own(3, virtual_batch_size=4)


def test_evaluation_and_state_are_batch_norms() -> None:
    layer = GhostBatchNorm3d(2, 2)
    plain = nn.BatchNorm3d(2)
    layer(torch.randn(4, 2, 2, 2, 2))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 2, 2, 2, 2)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert "virtual_batch_size=2" in repr(layer)


def test_compiled_step_equals_eager() -> None:
    layer = GhostBatchNorm2d(3, 2, dtype=torch.float64)
    layer(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    eager = copy.deepcopy(layer)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    eager(x)
    torch._dynamo.reset()
    a, b = (x.clone().requires_grad_() for _ in range(2))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(a)
    y.pow(3).sum().backward()
    eager(b).pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_var, eager.running_var, rtol=1e-12, atol=1e-12)
