"""Tier: gloo ranks. Whose statistics a layer shares: every way to say it, copies, and groups that come late or are gone."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.distributed import GroupSpec, group_spec, groups, make_subgroups
from syncnorm.testing import count_collectives, run_ranks

pytestmark = pytest.mark.gloo

# One step in float64 on a few dozen values.
BOUND = 1e-12


def _samples(rank: int) -> Tensor:
    # Different numbers of samples and a different level on each rank: a wrong partner shows.
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2 + rank, 3, generator=generator, dtype=torch.float64) + 10.0 * rank


def _partner_error(layer: nn.Module, partners: list[int]) -> float:
    """How far one training step of ``layer`` is from torch's on the samples of the partners."""
    whole = nn.BatchNorm1d(3, dtype=torch.float64)
    layer.load_state_dict(whole.state_dict())
    pieces = [_samples(rank).requires_grad_() for rank in partners]
    exact = whole(torch.cat(pieces))
    exact.pow(3).sum().backward()
    x = _samples(dist.get_rank() if dist.is_initialized() else partners[0]).requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    mine = partners.index(dist.get_rank()) if dist.is_initialized() else 0
    start = sum(len(piece) for piece in pieces[:mine])
    pairs = [
        (y, exact[start : start + len(x)]), (x.grad, pieces[mine].grad),
        (layer.running_mean, whole.running_mean), (layer.running_var, whole.running_var),
    ]  # fmt: skip
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / 10.0  # values are of the order of 10


def _layer(process_group: Any = None) -> syncnorm.SyncBatchNorm1d:
    return syncnorm.SyncBatchNorm1d(3, dtype=torch.float64, process_group=process_group)


def _every_spec() -> dict[str, tuple[float, int]]:
    rank = dist.get_rank()
    pairs, across = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    crossing = [dist.new_group(ranks) for ranks in across][rank % 2]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    everyone, alone = [0, 1, 2, 3], [rank]
    ways: dict[str, tuple[Any, list[int]]] = {
        "None": (None, everyone),
        "world": ("world", everyone),
        "node": ("node", everyone),
        "int 1": (1, alone),
        "int 2": (2, pairs[rank // 2]),
        "int 4": (4, everyone),
        "WORLD": (dist.group.WORLD, everyone),
        "ProcessGroup": (crossing, across[rank % 2]),
        "make_subgroups": (make_subgroups(2), pairs[rank // 2]),
        "make_subgroups node": (make_subgroups("node"), everyone),
        "DeviceMesh": (init_device_mesh("cpu", (4,)), everyone),
        "mesh['dp']": (mesh["dp"], across[rank % 2]),
        "mesh['tp']": (mesh["tp"], pairs[rank // 2]),
        "GroupSpec": (group_spec(crossing), across[rank % 2]),
    }
    out = {}
    for name, (process_group, partners) in ways.items():
        layer = _layer(process_group)
        layer(_samples(rank))  # groups are made at the first training forward
        with count_collectives() as counts:
            error = _partner_error(layer, partners)
        out[name] = error, counts.get("all_reduce", 0)
        assert set(counts) <= {"all_reduce"}
    return out


def test_every_way_to_name_the_ranks() -> None:
    for per_rank in run_ranks(_every_spec, 4, timeout=90):
        for name, (error, exchanges) in per_rank.items():
            assert error <= BOUND, (name, error)
            assert exchanges == (0 if name == "int 1" else 2), (name, exchanges)  # a group of one meets nobody


def _node(machines: list[int]) -> float:
    groups._machine_id = lambda: machines[dist.get_rank()]
    partners = [rank for rank, machine in enumerate(machines) if machine == machines[dist.get_rank()]]
    return _partner_error(_layer("node"), partners)


@pytest.mark.parametrize("machines", [[1, 1, 2, 2], [5, 7, 5, 7], [9, 3, 3, 3]], ids=str)
def test_node_is_the_ranks_of_one_machine(machines: list[int]) -> None:
    assert max(run_ranks(_node, 4, machines)) <= BOUND


def _group_of_one() -> tuple[bool, dict[str, int]]:
    layer, theirs = _layer(1), nn.BatchNorm1d(3, dtype=torch.float64)
    layer(_samples(0)), theirs(_samples(0))
    x, z = _samples(1).requires_grad_(), _samples(1).requires_grad_()
    with count_collectives() as counts:
        y = layer(x)
        y.square().sum().backward()
    theirs(z).square().sum().backward()
    pairs = [*zip(layer.state_dict().values(), theirs.state_dict().values(), strict=True), (x.grad, z.grad)]
    return all(torch.equal(a, b) for a, b in pairs), counts


def test_a_group_of_one_is_torchs_layer_bit_for_bit() -> None:
    assert run_ranks(_group_of_one, 2) == [(True, {})] * 2


def test_the_spec_is_shown_in_plain_form() -> None:
    assert _layer().process_group == _layer("world").process_group == "world"
    assert _layer("node").process_group == "node" and _layer(2).process_group == 2
    layer = _layer()
    layer.process_group = 2
    assert layer.process_group == 2
    layer.process_group = GroupSpec("named", name="7", ranks=(0, 2))
    assert layer.process_group == GroupSpec("named", name="7", ranks=(0, 2))
    assert repr(layer).endswith("process_group=ranks [0, 2])")


# ---------------------------------------------------------------------------------------------------- groups that cannot be


def _text(layer: nn.Module, x: Tensor) -> str:
    """The error of a training forward, which must leave the layer as it was."""
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    return f"{type(caught.value).__name__}: {caught.value}"


def _refused() -> dict[str, str]:
    rank, x = dist.get_rank(), _samples(dist.get_rank())
    out = {"divide": _text(_layer(2), x), "subgroups": ""}
    with pytest.raises(ValueError, match="must divide"):
        make_subgroups(2)
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("dp", "tp"))
    for process_group in (mesh, init_device_mesh("cpu", (3, 1))):
        with pytest.raises(ValueError) as caught:
            _layer(process_group)
        out["named mesh" if process_group is mesh else "mesh"] = str(caught.value)

    group = dist.new_group([0, 1])
    layer, spec = _layer(group), GroupSpec("named", name=getattr(group, "group_name", "1"), ranks=(0, 1))
    if rank == 2:
        assert layer.process_group == GroupSpec("outside") and layer.eval()(x).shape == x.shape
        out["outside"] = _text(layer.train(), x)
        out["outside spec"] = _text(_layer(spec), x)
        out["outside copy"] = _text(pickle.loads(pickle.dumps(layer)), x)
    else:  # the others go on without it
        assert _partner_error(layer, [0, 1]) <= BOUND and _partner_error(_layer(spec), [0, 1]) <= BOUND
    return out


def test_what_cannot_be_a_group_says_so_and_keeps_nobody_waiting() -> None:
    outcomes = run_ranks(_refused, 3)
    for out in outcomes:
        assert (
            "ValueError: SyncBatchNorm1d(3): process_group=2 must divide the number of ranks, which is 3"
            in out["divide"]
        )
        assert "Divisors are [1, 3]" in out["divide"]
        assert "must have one dim, got 2 dims ('dp', 'tp'). Pass mesh['dp']." in out["named mesh"]
        assert "must have one dim, got 2 dims" in out["mesh"] and "mesh_dim_names" in out["mesh"]
    outside = "SyncNormError: SyncBatchNorm1d(3): this rank is outside the process group that the layer was given"
    assert outcomes[2]["outside"].startswith(outside) and outcomes[2]["outside copy"].startswith(outside)
    assert outcomes[2]["outside spec"].startswith(
        "SyncNormError: SyncBatchNorm1d(3): rank 2 is outside the layer's process group of ranks [0, 1]"
    )


def test_without_a_process_group() -> None:
    with pytest.raises(syncnorm.SyncNormError, match="make_subgroups needs a default process group"):
        make_subgroups(2)
    for process_group in (None, "node", 2):  # one process: torch's layer, whatever the group will be
        assert _partner_error(_layer(process_group), [0]) == 0.0
    layer = _layer(GroupSpec("named", name="1", ranks=(0, 1)))
    text = _text(layer, _samples(0))
    assert "the layer's process group '1' of ranks [0, 1] does not exist here (any more)" in text
    assert "set it again" in text and 'process_group="world"' in text
    layer.eval()(_samples(0))


# ------------------------------------------------------------------------------------------------ groups that come and go


def _lifetimes(folder: str) -> dict[str, Any]:
    rank, x = dist.get_rank(), _samples(dist.get_rank())
    pair, partners = [[0, 1], [2, 3]][rank // 2], [0, 1, 2, 3]
    out: dict[str, Any] = {}

    subgroup = make_subgroups(2)
    in_use, by_int, world = _layer(subgroup), _layer(2), _layer()
    out["before"] = max(_partner_error(in_use, pair), _partner_error(by_int, pair), _partner_error(world, partners))
    dist.barrier()
    dist.destroy_process_group(subgroup)
    out["destroyed"] = _text(in_use, x)
    out["int makes its group again"] = _partner_error(by_int, pair)

    y = world(x).sum()
    dist.barrier()
    dist.destroy_process_group()
    out["no world"] = _text(world, x)
    with pytest.raises(syncnorm.SyncNormError) as caught:
        y.backward()
    out["no world, backward"] = str(caught.value)
    out["no world, int"] = _text(by_int, x)
    out["no world, named"] = _text(in_use, x)
    world.eval()(x)  # evaluation needs no group
    world.train()
    copied = copy.deepcopy(world)
    copied(x)  # a copy was never synchronised: one process is what it knows
    with syncnorm.disabled(world):
        world(x)
    born_before = _layer()
    born_before(x)

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", 4), rank=rank, world_size=4)
    out["again"] = max(_partner_error(layer, partners) for layer in (world, copied, born_before))
    out["again, named"] = _text(in_use, x)
    out["again, int"] = _partner_error(by_int, pair)
    in_use.process_group = make_subgroups(2)
    out["set again"] = _partner_error(in_use, pair)
    return out


def test_groups_that_come_late_or_go(tmp_path: Path) -> None:
    for out in run_ranks(_lifetimes, 4, str(tmp_path), timeout=90):
        for name in ("before", "int makes its group again", "again", "again, int", "set again"):
            assert out[name] <= BOUND, (name, out[name])
        for name in ("destroyed", "no world, named", "again, named"):
            assert "does not exist here (any more)" in out[name] and "SyncNormError" in out[name], (name, out[name])
        assert "does not exist here (any more)" in out["no world, backward"]
        assert "destroy groups after the last backward" in out["no world, backward"]
        assert "was synchronised over 4 ranks and now there is no process group" in out["no world"]
        assert "syncnorm.revert(model)" in out["no world"] and "syncnorm.disabled(model)" in out["no world"]
        assert "was synchronised over 2 ranks" in out["no world, int"]


def _a_name_taken(folder: str) -> float:
    rank = dist.get_rank()
    pair = [[0, 1], [2, 3]][rank // 2]
    layer = _layer(2)
    layer(_samples(rank))
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", 4), rank=rank, world_size=4)
    # On ranks 0 and 1 this group has the name and the ranks that ours had, on ranks 2 and 3 there is none. If only those
    # two made new ones, torch's numbering of groups would differ between ranks, and the next group would never meet.
    dist.new_group([0, 1])
    error = _partner_error(layer, pair)
    everyone = dist.new_group([0, 1, 2, 3])
    dist.all_reduce(torch.ones(1), group=everyone)
    return error


def test_a_new_world_makes_its_own_groups(tmp_path: Path) -> None:
    assert max(run_ranks(_a_name_taken, 4, str(tmp_path), group_timeout=10)) <= BOUND


def _other_ranks_of_that_name(folder: str) -> tuple[str, bool]:
    rank = dist.get_rank()
    first = dist.new_group([0, 1])
    layer = _layer(first)
    name = layer.process_group.name if rank < 2 else ""
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", 3), rank=rank, world_size=3)
    second = dist.new_group([1, 2])
    return _text(layer, _samples(rank)), rank == 1 and second.group_name == name


def _compiled_before_the_world(folder: str) -> tuple[bool, float]:
    rank, layer, x = dist.get_rank(), _layer(), _samples(dist.get_rank())
    dist.barrier()
    dist.destroy_process_group()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    alone = torch.equal(compiled(x), layer(x))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", 2), rank=rank, world_size=2)
    return alone, float((compiled(x) - layer(x)).abs().max())


def test_a_layer_that_was_compiled_before_there_was_a_group_is_traced_again(tmp_path: Path) -> None:
    for alone, error in run_ranks(_compiled_before_the_world, 2, str(tmp_path), timeout=90):
        assert alone and error <= BOUND


def test_a_name_that_now_means_other_ranks_is_refused(tmp_path: Path) -> None:
    outcomes = run_ranks(_other_ranks_of_that_name, 3, str(tmp_path))
    assert outcomes[1][1], "torch numbers its groups otherwise now: this test has lost its point"
    for text, _ in outcomes[:2]:
        assert "of ranks [0, 1] does not exist here (any more)" in text


# ---------------------------------------------------------------------------------------------------------------- copies


def _copies() -> tuple[float, bytes]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pair, crossing = [[0, 1], [2, 3]][rank // 2], [[0, 2], [1, 3]][rank % 2]
    ways: list[tuple[Any, list[int]]] = [
        (None, [0, 1, 2, 3]), ("node", [0, 1, 2, 3]), (2, pair), (1, [rank]),
        (make_subgroups(2), pair), (mesh["dp"], crossing), (dist.group.WORLD, [0, 1, 2, 3]),
    ]  # fmt: skip
    worst, files = 0.0, []
    for process_group, partners in ways:
        layer = _layer(process_group)
        for _ in range(2):  # as built, and after it has met the others
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            for twin in (
                copy.deepcopy(layer),
                pickle.loads(pickle.dumps(layer)),
                torch.load(file, weights_only=False),
                copy.copy(layer),
            ):
                assert twin.process_group == layer.process_group and type(twin) is type(layer)
                assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), layer.buffers(), strict=True))
            layer(_samples(rank))
            worst = max(worst, _partner_error(twin, partners), _partner_error(copy.deepcopy(layer), partners))
        files.append(pickle.dumps(layer))
    return worst, pickle.dumps(files)


def test_copies_of_a_layer_meet_the_same_ranks() -> None:
    outcomes = run_ranks(_copies, 4, timeout=90)
    assert max(error for error, _ in outcomes) <= BOUND
    # Here there are no ranks: what was "world", "node" or a number is plain batch norm, a named group says that it is gone.
    for layer in map(pickle.loads, pickle.loads(outcomes[0][1])):
        layer.eval()(_samples(0))
        layer.train()
        if isinstance(layer.process_group, GroupSpec):
            assert "does not exist here (any more)" in _text(layer, _samples(0))
        else:
            assert _partner_error(layer, [0]) == 0.0


# ----------------------------------------------------------------------------------------------------------- loss_weight


def _weighted(splits: list[int]) -> float:
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, sum(splits), 3, generator=generator, dtype=torch.float64).unbind(0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    whole = copy.deepcopy(model)
    nn.functional.mse_loss(whole(x), target).backward()
    part = slice(sum(splits[: dist.get_rank()]), sum(splits[: dist.get_rank() + 1]))
    wrapped = DistributedDataParallel(syncnorm.convert(model))
    loss = nn.functional.mse_loss(wrapped(x[part]), target[part])
    (loss * syncnorm.loss_weight(len(x[part]))).backward()
    errors = [float((a.grad - b.grad).abs().max()) for a, b in zip(model.parameters(), whole.parameters(), strict=True)]
    return max(errors)


@pytest.mark.parametrize("splits", [[5, 2], [4, 0, 3], [2, 2]], ids=str)
def test_weighted_mean_losses_give_ddp_the_gradient_of_the_whole_batch(splits: list[int]) -> None:
    assert max(run_ranks(_weighted, len(splits), splits)) <= BOUND


def _weights() -> list[float]:
    rank = dist.get_rank()
    sizes = [6, 2, 0, 4]
    pair = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    return [
        syncnorm.loss_weight(sizes[rank]),
        syncnorm.loss_weight(sizes[rank], group=2),
        syncnorm.loss_weight(sizes[rank], group=pair),
        syncnorm.loss_weight(sizes[rank], group=1),
        syncnorm.loss_weight(0),
        syncnorm.loss_weight(7),
    ]


def test_loss_weight_is_the_share_of_the_samples_times_the_ranks() -> None:
    assert run_ranks(_weights, 4) == [
        [2.0, 1.5, 2.0, 1.0, 1.0, 1.0],
        [2 / 3, 0.5, 2 / 3, 1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        [4 / 3, 2.0, 4 / 3, 1.0, 1.0, 1.0],
    ]
    assert syncnorm.loss_weight(5) == 1.0
    with pytest.raises(ValueError, match="num_local_samples must be at least 0, got -1"):
        syncnorm.loss_weight(-1)
