"""The share of a match that is done, as far as its steps can tell."""

from __future__ import annotations

import pytest

from c2m3_fl.core.estimate import Estimate
from c2m3_fl.core.match import match
from c2m3_fl.core.result import Step
from c2m3_fl.core.search import expected_reheating
from tests.core.networks import mlp, planted


def step(number, gain, nodes=3, **more):
    return Step(number, 1.0, None, gain, 1.0, 0.5, nodes, **more)


def test_an_ascent_is_done_as_far_as_its_gain_has_fallen_in_orders_of_magnitude():
    # Tolerance 1e-3: the ascent goes on for gains above 1e-4, so 1e-1 to 1e-4 are three orders of magnitude.
    estimate = Estimate(1e-3)
    shares = [estimate.add(step(number, gain)) for number, gain in enumerate([1e-1, 1e-2, 5e-2, 1e-3, 0.0], start=1)]
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 1])


def test_reheatings_are_counted_where_the_budget_allows_them():
    # The first ascent's work is 20. Four nodes are reheated three times, for .8 of it each: the whole is 68.
    estimate = Estimate(1e-3)
    estimate.add(step(1, 1e-1, 4, work=10))
    assert estimate.add(step(2, 0.0, 4, work=20)) == pytest.approx(20 / 68)
    assert estimate.add(step(1, 1e-2, 4, work=30, trial=True)) == pytest.approx(30 / 68)
    assert estimate.add(step(3, 1e-4, 4, work=35)) == pytest.approx(35 / 68)
    assert estimate.add(step(1, 1e-2, 4, work=70, trial=True)) == 1


@pytest.mark.parametrize(("nodes", "count"), [(3, 0), (4, 3), (5, 3), (7, 2), (10, 1), (15, 1), (16, 0)])
def test_reheatings_are_expected_in_the_numbers_that_the_page_names(nodes, count):
    assert expected_reheating(nodes) == pytest.approx(0.8 * count)


def test_a_first_step_without_gain_ends_the_ascent():
    assert Estimate(1e-3).add(step(1, 0.0)) == 1


@pytest.mark.parametrize("count", [3, 6])
def test_the_estimate_never_falls_during_a_match(count):
    nodes, _ = planted(mlp(12, 24, 24, 6), count, 1.0, seed=0)
    estimate, shares = Estimate(), []
    match(mlp(12, 24, 24, 6), nodes, callback=lambda step: shares.append(estimate.add(step)))
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert shares[-1] > 0.3


def test_the_rest_follows_from_the_time_that_has_passed():
    estimate = Estimate(1e-3)
    estimate.add(step(1, 1e-1))
    assert estimate.rest(10.0) == float("inf")
    estimate.add(step(2, 1e-2))
    assert estimate.rest(10.0) == pytest.approx(20.0)
