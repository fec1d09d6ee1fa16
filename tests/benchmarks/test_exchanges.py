"""The benchmark of exchanges: what it counts is what the shapes say."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.benchmarks.exchanges import METHODS, RESULTS, measure, priced
from tests.benchmarks.records import read_record


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_clients_are_sent_and_answer_are_those_that_follow_from_the_shapes(method):
    asked, priced_only = (measure("lenet", method, asks=asks) for asks in (True, False))
    for name in ("exchanges", "sent", "answered", "largest_sent", "largest_answered"):
        assert getattr(asked, name) == getattr(priced_only, name), name
    assert (priced_only.client, priced_only.server) == (None, None)


def test_a_price_keeps_what_was_measured_of_the_same_exchanges_and_nothing_of_others():
    row = measure("lenet", "RegMean()", asks=False)
    known = {**asdict(row), "sent": 7, "client": 0.5, "server": 1.5}
    kept = priced(row, known)
    assert (kept.sent, kept.client, kept.server) == (7, 0.5, 1.5)
    assert priced(row, {**known, "answered": 8}) == priced(row, None) == row


def test_the_largest_exchange_of_the_record_has_at_least_the_mean_and_at_most_the_sum():
    for row in read_record(RESULTS)["rows"]:
        for name in ("sent", "answered"):
            assert row[name] / row["exchanges"] <= row[f"largest_{name}"] <= row[name], (row["network"], name)
