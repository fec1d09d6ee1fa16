"""Transformers and LSTMs trained from different seeds merge far above plain averaging."""

from __future__ import annotations

import pytest

from tests.benchmarks.sequences import Digits, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["transformer", "LSTM"])
def scores(request):
    """Accuracies of one pair of seeds, by column."""
    return request.param, {row.column: row.accuracy for row in rows(request.param, 0, Digits.load())}


def test_recalibrated_merges_are_far_above_plain_averaging(scores):
    # LSTMs on digits leave no room for more: their plain mean is at .68, the endpoints at .97.
    network, found = scores
    margin = {"transformer": 0.3, "LSTM": 0.15}[network]
    for recalibrated in ("C2M3 + REPAIR", "C2M3 + refit"):
        assert found[recalibrated] >= found["plain mean"] + margin


def test_what_repair_leaves_of_plain_averaging_is_below_matching_and_repair(scores):
    _, found = scores
    assert found["C2M3 + REPAIR"] >= found["plain mean + REPAIR"] + 0.05


def test_refit_merges_are_near_the_endpoints(scores):
    _, found = scores
    assert found["C2M3 + refit"] >= found["mean endpoint"] - 0.08
