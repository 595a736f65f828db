"""Tier: no process. The row that ranks exchange is the same from one native operator as from torch's, and comes back whole."""

import pytest
import torch
from torch import Tensor

from syncnorm.core.moments import Moments, empty_moments, merge_moments, stack_moments
from syncnorm.distributed import row
from syncnorm.distributed.row import LocalMoments, Payload, Sums
from syncnorm.kernels import native

SIZES = [1, 3, 199, 1023]
WORDS = [1.0, 7.0, 12345.0, 12345.0**2, 0.0, 2.0**32]
HERE = ["torch", "native"]


@pytest.fixture(params=HERE)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(row, "_native", lambda t: False)
    elif native.load() is not None:
        pytest.skip(str(native.load()))
    return str(request.param)


def part(size: int, count: float, seed: int = 0, offset: float = 3.0) -> Moments:
    generator = torch.Generator().manual_seed(size + 1000 * seed)
    mean = torch.randn(size, generator=generator, dtype=torch.float64) + offset
    return Moments(count, mean, torch.rand(size, generator=generator, dtype=torch.float64) * count)


def added(payloads: list[Payload], gap: int, words: list[float]) -> Tensor:
    """The sum of what ranks packed, each of which lies where it should."""
    rows = []
    for payload in payloads:
        packed = payload.pack(payload.num_words + gap + len(words), words)
        assert packed.dtype == torch.float64 and packed.is_contiguous()
        end = packed.numel() - len(words)
        assert packed[end:].tolist() == words
        assert not packed[payload.num_words : end].any()
        rows.append(packed)
    return torch.stack(rows).sum(0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("counts", [(392.0, 8.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize(("gap", "words"), [(5, WORDS), (0, [1.0]), (0, [])])
def test_moments_come_back_as_those_of_all(
    by: str, size: int, counts: tuple[float, float], gap: int, words: list[float]
) -> None:
    parts = [part(size, n, seed) if n else empty_moments(size, torch.device("cpu")) for seed, n in enumerate(counts)]
    total = added([LocalMoments(p) for p in parts], gap, words)
    moments, heard = LocalMoments(parts[0]).read(total, len(words))
    assert heard == [2 * word for word in words]
    expected = merge_moments(stack_moments(parts))
    assert moments.count == float(expected.count) and isinstance(moments.count, float)
    # From sums of squares about 0: 1e-16·(mean² + var)·n is lost of M2.
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.m2, expected.m2, rtol=1e-13, atol=1e-13 * sum(counts))


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (5, 199), (2, 1023)])
@pytest.mark.parametrize("divisor", [None, 392.0, 3.0])
def test_sums_come_back_in_their_shape_and_over_a_count(by: str, shape: tuple[int, ...], divisor: float | None) -> None:
    parts = [
        torch.randn(shape, dtype=torch.float64),
        torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape))[::-1]),
    ]
    read, heard = Sums(parts[0], divisor).read(added([Sums(p) for p in parts], 3, WORDS), len(WORDS))
    assert heard == [2 * word for word in WORDS]
    assert torch.equal(read, (parts[0] + parts[1]) / (divisor or 1.0))


def test_variance_of_rounding_is_not_negative_and_nan_stays(by: str) -> None:
    total = torch.tensor([4.0, 4.0, 8.0, float("nan"), 4.0 - 1e-9, 16.5, 1.0], dtype=torch.float64)
    moments, heard = LocalMoments(part(3, 4.0)).read(total, 0)
    assert moments.m2[:2].tolist() == [0.0, 0.5] and moments.m2[2].isnan() and heard == []


def test_both_ways_make_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load() is not None:
        pytest.skip(str(native.load()))
    payloads: list[Payload] = [LocalMoments(part(199, 392.0)), Sums(torch.randn(2, 199, dtype=torch.float64))]
    ours = [payload.pack(640, WORDS) for payload in payloads]
    monkeypatch.setattr(row, "_native", lambda t: False)
    for a, b in zip(ours, (payload.pack(640, WORDS) for payload in payloads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)  # a fused multiply-add apart


def test_what_the_host_may_not_look_at_is_not_looked_at() -> None:
    class Elsewhere(Tensor):
        pass

    total = torch.arange(13.0, dtype=torch.float64).as_subclass(Elsewhere)
    moments, heard = LocalMoments(part(3, 4.0)).read(total, 6)
    assert heard is None and isinstance(moments.count, Tensor)
    sums, heard = Sums(torch.zeros(7, dtype=torch.float64), torch.tensor(2.0)).read(total, 6)
    assert heard is None and sums.tolist() == [i / 2 for i in range(7)]


def test_a_row_that_is_too_short_is_refused() -> None:
    if native.load() is not None:
        pytest.skip(str(native.load()))
    with pytest.raises(RuntimeError, match="a row of 12 has no room for 7 words and 6"):
        LocalMoments(part(3, 4.0)).pack(12, WORDS)
    with pytest.raises(RuntimeError, match="no moments of 3 channels in a row of 12"):
        LocalMoments(part(3, 4.0)).read(torch.zeros(12, dtype=torch.float64), 6)
    with pytest.raises(RuntimeError, match="no 7 sums in a row of 12"):
        Sums(torch.zeros(7, dtype=torch.float64)).read(torch.zeros(12, dtype=torch.float64), 6)
