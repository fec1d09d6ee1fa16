from __future__ import annotations

import pytest

from tests.benchmarks.server_costs import CASES, Row, measure, table


@pytest.mark.parametrize("moved", CASES)
def test_replies_move_as_announced_and_cost_something(moved):
    row = measure("cnn", 3, moved=moved)
    assert (row.case, row.clients) == (CASES[moved], 3)
    assert row.size == pytest.approx(4 * 26714, rel=0.02)  # parameters in float32, and the arrays' headers
    assert 0 < row.fedavg < row.c2m3
    assert row.c2m3_memory > 0


def test_the_table_has_a_row_where_both_cases_were_measured():
    rows = [Row("cnn", case, 3, 10**6, 0.001, 0.5, 10**6, 2 * 10**6) for case in CASES.values()]
    (line,) = table([*rows, Row("cnn", CASES[True], 10, 1, 1.0, 1.0, 1, 1)]).splitlines()[2:]
    assert line == "| CNN 8-16 | 1.00 | 3 | 0.001 | 0.50 | 0.50 | 1 | 2 | 2 |"
