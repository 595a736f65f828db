"""Tier: no process. Moments, their merge and the row that adds up over ranks, against numpy and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from syncnorm.core.moments import Moments, empty_moments, from_sums, merge_moments, stack_moments, to_sums


def moments_of(x: torch.Tensor) -> Moments:
    """Two passes in numpy float64; x [n, C]."""
    values = x.double().numpy()
    mean = values.mean(0) if len(values) else np.zeros(values.shape[1])
    return Moments(float(len(values)), torch.from_numpy(mean), torch.from_numpy(((values - mean) ** 2).sum(0)))


@pytest.mark.parametrize("splits", [[4, 4], [7, 2], [5, 0, 3], [1, 1, 1, 1], [199, 1, 0, 1023]])
def test_merge_equals_all_samples_at_once(splits: list[int]) -> None:
    x = torch.randn(sum(splits), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    merged = merge_moments(stack_moments([moments_of(part) for part in x.split(splits)]))
    whole = moments_of(x)
    assert float(merged.count) == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-13, atol=0)


def test_merging_depends_neither_on_order_nor_on_brackets() -> None:
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    parts = [moments_of(part) for part in x.split([7, 0, 1, 19, 3])]
    whole = merge_moments(stack_moments(parts))
    pairwise = parts[0]
    for part in parts[1:]:
        pairwise = merge_moments(stack_moments([pairwise, part]))
    halves = [merge_moments(stack_moments(half)) for half in (parts[:2], parts[2:])]
    for other in (merge_moments(stack_moments(parts[::-1])), pairwise, merge_moments(stack_moments(halves))):
        for mine, theirs in zip(other, whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("splits", [[4, 4], [7, 2], [5, 0, 3], [199, 1, 0, 1023]])
def test_rows_add_up_to_the_moments_of_all(splits: list[int]) -> None:
    x = torch.randn(sum(splits), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    row = sum(to_sums(moments_of(part)) for part in x.split(splits))
    whole, summed = moments_of(x), from_sums(row)
    torch.testing.assert_close(summed.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(summed.m2, whole.m2, rtol=1e-12, atol=0)  # 1e-16·(1 + (mean/std)²)·a few
    assert float(summed.count) == sum(splits) and float(from_sums(row, float(row[0])).count) == sum(splits)


def test_counts_are_exact_beyond_float32_and_int32() -> None:
    for count in (2**24 + 1, 2**31 + 1, 2**40 + 3):
        row = to_sums(Moments(float(count), *torch.zeros(2, 1, dtype=torch.float64)))
        assert int(from_sums(row + row).count) == 2 * count


def test_wire_loses_no_more_variance_than_promised() -> None:
    # Promise: about 1e-16·(mean/std)². The exact variance of these five values is 2.
    for ratio in (1e2, 1e4, 1e6):
        values = [Fraction(int(ratio)) + k for k in range(-2, 3)]
        mean = sum(values) / 5
        m2 = float(sum((v - mean) ** 2 for v in values))
        row = to_sums(
            Moments(5.0, torch.tensor([float(mean)], dtype=torch.float64), torch.tensor([m2], dtype=torch.float64))
        )
        error = abs(float(from_sums(row + row).var) - 2) / 2
        assert error <= 8 * 1.1e-16 * ratio**2 + 1e-15, (ratio, error)


def test_variance_is_never_negative_and_empty_is_neutral() -> None:
    constant = Moments(7.0, torch.tensor([0.1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert float(from_sums(3 * to_sums(constant)).m2) >= 0
    nothing = from_sums(to_sums(empty_moments(2, torch.device("cpu"))))
    assert (
        nothing.mean.tolist() == [0, 0] and nothing.var.tolist() == [0, 0] and nothing.unbiased_var.tolist() == [0, 0]
    )
    both = merge_moments(stack_moments([constant, empty_moments(1, torch.device("cpu"))]))
    assert (float(both.count), float(both.mean), float(both.m2)) == (7.0, 0.1, 0.0)
