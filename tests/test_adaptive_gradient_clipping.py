"""Tier: no process. Adaptive gradient clipping against its formula in numpy, and inside Lightning's loop."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning as pl_old
import torch
from torch import nn

from syncnorm import SyncNormError
from syncnorm.functional import adaptive_gradient_clip_
from syncnorm.lightning import AdaptiveGradientClipping

SHAPES = [(5, 3, 3, 3), (4, 7), (6,), (), (3, 1, 1)]


def parameters(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(14)
    made = [nn.Parameter((torch.randn(shape).double() * 0.1).to(dtype)) for shape in SHAPES]
    for parameter in made:
        size = (parameter.size(0), *[1] * (parameter.dim() - 1)) if parameter.dim() else ()
        parameter.grad = (torch.randn(parameter.shape).double() * torch.rand(size).double() * scale).to(dtype)
    return made


def formula(w: np.ndarray, g: np.ndarray, factor: float, eps: float) -> np.ndarray:
    axes = tuple(range(1, w.ndim)) if w.ndim > 1 else None
    w_norm = np.maximum(np.sqrt((w**2).sum(axes, keepdims=True)), eps)
    g_norm = np.sqrt((g**2).sum(axes, keepdims=True))
    return np.where(g_norm / w_norm > factor, factor * w_norm / g_norm * g, g)


@pytest.mark.parametrize("factor", [0.01, 0.5, 3.0])
def test_equals_the_formula_and_stays_within_the_bound(factor: float) -> None:
    mine = parameters()
    before = [p.grad.clone() for p in mine]
    adaptive_gradient_clip_(mine, factor)
    for p, g in zip(mine, before, strict=True):
        want = formula(p.detach().numpy(), g.numpy(), factor, 1e-3)
        np.testing.assert_allclose(p.grad.numpy(), want, rtol=1e-13, atol=0)
        dims = tuple(range(1, p.dim())) if p.dim() > 1 else None
        bound = factor * torch.linalg.vector_norm(p.detach(), dim=dims).clamp(min=1e-3)
        assert (torch.linalg.vector_norm(p.grad, dim=dims) <= bound * (1 + 1e-12)).all()
    once = [p.grad.clone() for p in mine]
    adaptive_gradient_clip_(mine, factor)
    for p, g in zip(mine, once, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-14, atol=0)  # idempotent


def test_gradients_within_the_bound_keep_their_bits_and_the_share_is_counted() -> None:
    w = nn.Parameter(torch.ones(4, 2))
    w.grad = torch.tensor([[0.003, 0.004], [3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
    share = adaptive_gradient_clip_(w, clip_factor=0.1)
    assert share is not None and share.item() == 0.5
    assert torch.equal(w.grad[0], torch.tensor([0.003, 0.004])) and not w.grad[2].any()
    torch.testing.assert_close(w.grad[1], 0.1 * 2**0.5 * torch.tensor([0.6, 0.8]))


def test_a_zero_weight_can_leave_zero() -> None:
    w = nn.Parameter(torch.zeros(2, 3))
    w.grad = torch.ones(2, 3)
    adaptive_gradient_clip_([w], clip_factor=0.01, eps=1e-3)
    torch.testing.assert_close(w.grad.norm(dim=1), torch.full((2,), 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_have_float_norms(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.full((2, 8), 2.0).to(dtype))
    w.grad = torch.full((2, 8), 300.0).to(dtype)  # squares beyond float16
    adaptive_gradient_clip_(w, clip_factor=0.1)
    torch.testing.assert_close(w.grad.float(), torch.full((2, 8), 0.2), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_what_has_no_gradient_is_skipped() -> None:
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    assert adaptive_gradient_clip_([nn.Parameter(torch.ones(2)), empty]) is None
    assert adaptive_gradient_clip_([]) is None
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"dense gradients, got torch\.sparse_coo for a parameter \[4, 2\]\. Leave"):
        adaptive_gradient_clip_(table.parameters())
    for name in ("clip_factor", "eps"):
        with pytest.raises(ValueError, match=rf"{name} must be positive, got 0"):
            adaptive_gradient_clip_([], **{name: 0})


class Model(pl.LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(15)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.automatic_optimization = not manual

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = self.head(self.body(batch[0]).relu()).square().sum() * 100
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def run(model: Any, callback: Any, **options: Any) -> Any:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), 4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback], **options,
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


@pytest.mark.parametrize("manual", [False, True])
def test_callback_clips_before_the_step_and_leaves_out_what_is_excluded(manual: bool) -> None:
    model, seen = Model(manual), {}
    callback = AdaptiveGradientClipping(clip_factor=0.02, exclude=["head.*"])

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            callback.on_before_optimizer_step(trainer, pl_module, optimizer)
            for name in ("body", "head"):
                weight = getattr(pl_module, name).weight
                seen[name] = float((weight.grad.norm(dim=1) / weight.detach().norm(dim=1)).max())

    trainer = run(model, Look())
    assert seen["body"] <= 0.02 * 1.001 and seen["head"] > 0.02
    assert 0 < float(trainer.callback_metrics["sn/clipped"]) <= 1


def test_callback_is_called_by_the_trainer_itself() -> None:
    torch.manual_seed(16)
    plain, clipped = Model(), Model()
    start = plain.body.weight.detach().clone()
    run(plain, pl.Callback())
    torch.manual_seed(16)
    run(clipped, AdaptiveGradientClipping(0.01))
    moved = [float((m.body.weight.detach() - start).norm()) for m in (plain, clipped)]
    assert moved[1] < moved[0] / 10
    assert moved[1] <= 2 * 1e-3 * 0.01 * float(start.norm()) * 1.01  # 2 steps of lr · λ · ‖w‖


def test_both_lightnings_accept_it() -> None:
    for package in (pl, pl_old):
        assert isinstance(AdaptiveGradientClipping(), package.Callback)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"clip_factor must be positive, got -1"):
        AdaptiveGradientClipping(-1)
    with pytest.raises(ValueError, match=r"exclude is a list of globs, got 'head\.\*'\. Use \['head\.\*'\]"):
        AdaptiveGradientClipping(exclude="head.*")
    with pytest.raises(
        ValueError, match=r"'fc\.\*' matches no parameter\. They are called 'body\.weight' to 'head\.bias'"
    ):
        run(Model(), AdaptiveGradientClipping(exclude=["fc.*"]))


def test_sharded_strategies_are_refused() -> None:
    class Stub:
        strategy = pl.strategies.ModelParallelStrategy()

    with pytest.raises(SyncNormError, match=r"whole filters on every rank, and ModelParallelStrategy.*strategy='ddp'"):
        AdaptiveGradientClipping().setup(Stub(), Model(), "fit")
