from __future__ import annotations

import pytest

from tests.benchmarks.growth import SERIES, Row, exponent, measure, table


@pytest.mark.parametrize("series", SERIES, ids=lambda series: f"{series.title}, {series.axis}")
def test_the_smallest_point_of_every_series_is_measured_and_a_pass_is_a_part_of_a_match(series):
    row = measure(series, series.values[0])
    assert (row.series, row.axis, row.value) == (series.title, series.axis, series.values[0])
    assert 0 < row.one_pass < row.match


def test_the_exponent_is_that_of_the_last_two_points():
    rows = [Row("a", "nodes", value, 1.0, seconds) for value, seconds in ((1, 7.0), (10, 2.0), (100, 200.0))]
    assert exponent(rows) == pytest.approx(2.0)
    assert "| a | nodes | 100 | 1.000 | 200.00 |" in table(rows)
