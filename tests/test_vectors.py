"""Tier: no process. Work on the vectors of a layer in one operator each is what core says it is."""

import pytest
import torch
from torch import Tensor

from syncnorm.core import moments as core_moments
from syncnorm.core import running as core_running
from syncnorm.core.moments import Moments
from syncnorm.core.running import RunningStatistics
from syncnorm.kernels import native, vectors

pytestmark = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))

SIZES = [1, 3, 199, 1023]


def moments(size: int, count: float, offset: float = 3.0) -> Moments:
    generator = torch.Generator().manual_seed(size)
    mean = torch.randn(size, generator=generator, dtype=torch.float64) + offset
    return Moments(count, mean, torch.rand(size, generator=generator, dtype=torch.float64) * count)


@pytest.fixture(autouse=True)
def _nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    called = vectors._serves
    monkeypatch.setattr(vectors, "_serves", lambda *arguments: called(*arguments) or pytest.fail("core served"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0.0, 1.0, 392.0])
def test_inverse_std(size: int, count: float) -> None:
    batch = moments(size, count) if count else core_moments.empty_moments(size, torch.device("cpu"))
    torch.testing.assert_close(vectors.inverse_std(batch, 1e-5), (batch.var + 1e-5).rsqrt(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, 1.0, None])
@pytest.mark.parametrize("counts", [True, False])
def test_running_statistics(dtype: torch.dtype, momentum: float | None, counts: bool) -> None:
    def buffers() -> RunningStatistics:
        counter = torch.tensor(0) if counts else None
        return RunningStatistics(torch.zeros(199, dtype=dtype), torch.ones(199, dtype=dtype), counter, momentum)

    ours, theirs = buffers(), buffers()
    for count in (392.0, 1.0, 0.0, 2.0):
        vectors.update_running(ours, moments(199, count))
        core_running.update_running(theirs, moments(199, count))
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            if a is None or b is None:
                assert a is b
            else:  # one rounding apart: torch's lerp is vectorised
                eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
                torch.testing.assert_close(a, b, rtol=2 * eps, atol=eps)


def test_running_statistics_may_be_views_and_autograd_is_told() -> None:
    def run(update: object) -> tuple[Tensor, Tensor]:
        table = torch.zeros(5, 2)
        running = RunningStatistics(table[:, 0], table[:, 1], torch.tensor(0), 0.25)
        update(running, moments(5, 8.0))  # type: ignore[operator]
        return table, running.num_batches_tracked  # type: ignore[return-value]

    ours, theirs = run(vectors.update_running), run(core_running.update_running)
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == theirs[1] == 1
    mean = torch.zeros(3)
    kept = (torch.ones(3, requires_grad=True) * mean).sum()  # saves the buffer
    vectors.update_running(RunningStatistics(mean, torch.ones(3), None, 0.1), moments(3, 8.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_inference_tensors_move_too() -> None:
    with torch.inference_mode():
        running = RunningStatistics(torch.zeros(3), torch.ones(3), torch.tensor(0), 1.0)
    vectors.update_running(running, moments(3, 8.0))
    torch.testing.assert_close(running.mean, moments(3, 8.0).mean.float())
    assert running.num_batches_tracked == 1


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match="running statistics of 4 channels for a batch of 3"):
        vectors.update_running(RunningStatistics(torch.zeros(4), torch.ones(4), None, 0.1), moments(3, 8.0))
