"""Tier: no process, and gloo ranks. Each injected fault does what its name says, once, and leaves nothing behind."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm.testing import FAULTS, FaultInjected, inject, run_ranks


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4))


def seen(fault: Any, **options: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """What reached the first norm and left it in each of three calls, with a fault in the second."""
    net, calls = model(), []
    run = nn.BatchNorm1d.forward

    class Spy(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            calls[-1] |= {"runs": calls[-1]["runs"] + 1, "x": x, "training": self.training, "weight": self.weight}
            calls[-1]["grad"] = torch.is_grad_enabled()
            return run(self, x.float()).to(x.dtype)  # torch's layer refuses what its parameters are not

    net[1].__class__ = Spy
    with inject(net, fault, layer="1", call=2, **options) as injected:
        for _ in range(3):
            calls.append({"runs": 0})
            calls[-1]["y"] = net[1](net[0](torch.randn(5, 3)))
    assert injected.calls == 3 and injected.at is not None and time.monotonic() - injected.at < 60
    assert "forward" not in vars(net[1]) and net[1].training
    for ordinary in (calls[0], calls[2]):
        assert ordinary["runs"] == 1 and ordinary["x"].shape == (5, 4) and ordinary["x"].dtype == torch.float32
        assert ordinary["training"] and ordinary["grad"] and ordinary["y"].isfinite().all()
    return calls[1], net[1].running_mean


def test_each_fault_of_a_call_happens_in_that_call_alone() -> None:
    assert seen("skip")[0]["runs"] == 0
    assert seen("extra")[0]["runs"] == 2
    assert seen("eval")[0]["training"] is False
    assert seen("no_grad")[0]["grad"] is False
    narrow = seen("channels")[0]
    assert narrow["x"].shape == (5, 3) and narrow["weight"].shape == (3,) and narrow["y"].shape == (5, 4)
    double = seen("dtype")[0]
    assert double["x"].dtype == torch.float64 and double["y"].dtype == torch.float32
    empty = seen("empty")[0]
    assert empty["x"].shape == (0, 4) and empty["y"].shape == (0, 4)
    bad = seen("nan")[0]["x"]
    assert bad[0, 0].isnan() and bad.flatten()[1:].isfinite().all()
    start = time.monotonic()
    assert seen("stuck", seconds=0.2)[0]["runs"] == 1 and time.monotonic() - start >= 0.2


def test_drift_raise_and_bad_input() -> None:
    net, x = model(), torch.randn(5, 3)
    with inject(net, "drift", layer="1"):
        net.eval()(x)
    assert net[1].running_mean.tolist() == [1, 0, 0, 0] and net[3].running_mean.tolist() == [0] * 4
    with pytest.raises(FaultInjected), inject(net, "raise"):
        net(x)
    with (
        pytest.raises(RuntimeError, match="running_mean should contain 3 elements not 4"),
        inject(net, "bad_input", layer="1"),
    ):
        net(x)
    assert net(x).shape == (5, 4) and all("forward" not in vars(m) for m in net.modules())


def test_swapped_layers_run_in_each_others_place() -> None:
    net, order = model(), []
    for name in ("1", "3"):
        net[int(name)].register_buffer("name", torch.tensor(int(name)), persistent=False)
    run = nn.BatchNorm1d.forward

    class Spy(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            order.append(int(self.name))
            return run(self, x)

    net[1].__class__ = net[3].__class__ = Spy
    with inject(net, "swap", layer="1", call=2):
        for _ in range(3):
            net(torch.randn(5, 3))
    assert order == [1, 3, 3, 1, 1, 3]


@pytest.mark.parametrize("fault", ["backward_order", "no_backward"])
def test_faults_of_the_backward(fault: Any) -> None:
    net, order = model(), []
    with inject(net, fault, call=2):
        for k in range(4):
            y = checkpoint(
                net, torch.randn(5, 3, requires_grad=True), use_reentrant=True
            )  # its own backward is not one
            y.register_hook(lambda grad, k=k: order.append(k))
            y.sum().backward()
    assert order == ([0, 2, 1, 3] if fault == "backward_order" else [0, 2, 3])
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_a_fault_that_did_not_happen_is_an_error() -> None:
    net = model()
    with (
        pytest.raises(AssertionError, match="at call 3 of '1' and did not: there were 1 calls"),
        inject(net, "nan", layer="1", call=3),
    ):
        net(torch.randn(5, 3))
    with (
        pytest.raises(AssertionError, match="held a backward pass back for the next one, and none came"),
        inject(net, "backward_order"),
    ):
        net(torch.randn(5, 3)).sum().backward()
    with inject(net, "nan", layer="1", rank=1) as injected:  # another rank
        assert net(torch.randn(5, 3)).isfinite().all()
    assert injected.at is None


def test_what_cannot_be_injected() -> None:
    net = model()
    for arguments, text in [
        ({"fault": "skipp"}, "there is no fault 'skipp'; is 'skip' meant"),
        ({"fault": "skip", "call": 0}, "calls are counted from 1, got call=0"),
        ({"fault": "skip", "layer": "11"}, r"the model has no layer '11'; close names: \['1'\]"),
        ({"fault": "no_backward", "layer": "1"}, "happens to a backward pass of the whole model, got layer='1'"),
        ({"fault": "channels", "layer": "0"}, "needs a layer of 2 or more num_features, got '0', a Linear"),
        ({"fault": "drift", "layer": "0"}, "needs a layer with a floating-point buffer, got '0', a Linear"),
        ({"fault": "swap", "layer": "0"}, "'swap' finds no other layer like '0', a Linear"),
    ]:
        with pytest.raises(ValueError, match=text), inject(net, **arguments):
            pass


def _end(fault: Any, mark: Path) -> bool:
    net = model()
    with inject(net, fault, rank=1, on_strike=mark.touch):
        net(torch.randn(5, 3))
    while not mark.exists():  # rank 0, at whose end the other is killed
        time.sleep(0.02)
    return mark.exists()


@pytest.mark.gloo
@pytest.mark.parametrize("fault", ["kill", "exit", "stop"])
def test_faults_that_end_or_freeze_a_process(fault: Any, tmp_path: Path) -> None:
    assert run_ranks(_end, 2, fault, tmp_path / "struck", lost=[1], timeout=60) == [True, None]


def test_every_fault_is_tested_here() -> None:
    text = Path(__file__).read_text()
    assert [fault for fault in FAULTS if f'"{fault}"' not in text] == []
