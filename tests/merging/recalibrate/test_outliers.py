"""What is far from the others is left out, whatever it is, and no claim outweighs all others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2m3_fl.merging.recalibrate.outliers import capped, far_from_others


def alike(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [1 + 0.1 * torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_values_that_are_alike_stay():
    assert far_from_others(alike(5), limit=5, floor=3) == []


@pytest.mark.parametrize("factor", [10.0, -10.0, 1e37, 1e300, -1e300])
@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_one_value_of_another_size_is_far(count, factor):
    values = alike(count)
    values[1] = factor * values[1]
    assert far_from_others(values, limit=5, floor=3) == [1]


def test_one_that_is_a_little_odd_among_values_that_are_all_alike_stays():
    values = [torch.ones(4, dtype=torch.float64) for _ in range(5)]
    values[0] = 1.5 * values[0]
    assert far_from_others(values, limit=5, floor=3) == []


def test_one_value_alone_is_not_far():
    assert far_from_others(alike(1), limit=5, floor=3) == []
    assert far_from_others([], limit=5, floor=3) == []


@given(st.lists(st.floats(1, 100), min_size=2, max_size=9), st.floats(1e3, 1e300))
def test_no_claim_exceeds_ten_times_the_others_median(counts, claim):
    found = capped([*counts, claim])
    assert found[-1] <= 10 * sorted([*counts, claim])[len(counts) // 2]
    assert found[:-1] == [min(count, max(found)) for count in counts]


def test_counts_within_ten_times_their_median_stay_as_they_are():
    assert capped([32, 100, 700, 45]) == [32, 100, 450, 45]  # the lower median is 45
    assert capped([32, 100, 700, 100]) == [32, 100, 700, 100]
