"""Tier: no process. Export, fusion and quantisation see a batch norm: in evaluation at once, and in every way after revert."""

import copy
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import fuse_modules
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncnorm


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(torch.randn(4, 3, 6, 6) * 2 + 1)
    return model.eval()


X = torch.randn(2, 3, 6, 6)


def test_the_exported_evaluation_graph_is_batch_norms() -> None:
    plain = trained()
    graphs = [torch.export.export(model, (X,)).graph for model in (plain, syncnorm.convert(copy.deepcopy(plain)))]
    targets = [[(node.op, str(node.target)) for node in graph.nodes] for graph in graphs]
    assert targets[0] == targets[1]
    assert any("batch_norm" in target for _, target in targets[0])


@pytest.mark.parametrize(
    ("to", "options"),
    [("sync_batch_norm", {"fuse": True}), ("group_norm", {"num_groups": 2}), ("rms_norm", {}), ("switchable_norm", {})],
)
def test_onnxruntime_agrees_for_any_batch(to: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = syncnorm.convert(trained(), to, **options)
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        torch.onnx.export(model, (X,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(3, 3, 6, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=0, atol=1e-5)  # float32, values of order 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("to", ["sync_batch_norm", "batch_renorm", "frozen_batch_norm"])
def test_fx_takes_a_converted_norm_for_a_leaf_as_torchs_is(to: str, training: bool) -> None:
    model = syncnorm.convert(trained(), to).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert [(node.op, str(node.target)) for node in traced.graph.nodes][2] == ("call_module", "1")
    torch.testing.assert_close(traced(X), model(X), rtol=0, atol=0)
    for now, before in zip(traced.buffers(), model.buffers(), strict=True):
        assert torch.equal(now, before)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = syncnorm.SyncBatchNorm2d(3, activation="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, residual=x)


def test_fx_keeps_what_a_norm_is_called_with() -> None:
    block = Residual()
    torch.testing.assert_close(fx.symbolic_trace(block)(X), block(X), rtol=0, atol=0)


def test_conv_and_converted_norm_fuse() -> None:
    model = syncnorm.convert(trained())
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(X), nn.Sequential(*model[:2])(X))


def test_after_revert_the_tools_find_what_they_know() -> None:
    model = syncnorm.revert(syncnorm.convert(trained()))
    exact = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager quantisation is deprecated
        merged = fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    by_fx = fuse(model)
    for fused in (merged, by_fx):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(X), exact)
