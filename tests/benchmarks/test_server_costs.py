from __future__ import annotations

import pytest
import torch

from c2m3_fl.symmetry.discover import permutation_spec
from tests.benchmarks.server_costs import CASES, Row, build, measure, replies, table


@pytest.mark.parametrize("case", CASES)
def test_replies_move_as_announced_and_cost_something(case):
    row = measure("cnn", 3, case)
    assert (row.case, row.clients) == (case, 3)
    assert row.size == pytest.approx(4 * 26714, rel=0.02)  # parameters in float32, and the arrays' headers
    assert 0 < row.fedavg < row.c2m3
    assert row.c2m3_memory > 0


def test_the_table_has_a_row_where_all_cases_were_measured():
    rows = [Row("cnn", case, 3, 10**6, 0.001, 0.5, 10**6, 2 * 10**6) for case in CASES]
    (line,) = table([*rows, Row("cnn", CASES[-1], 10, 1, 1.0, 1.0, 1, 1)]).splitlines()[2:]
    assert line == "| CNN 8-16 | 1.00 | 3 | 0.001 | 0.50 | 0.50 | 0.50 | 1 | 2 | 2 | 2 |"


def test_a_newcomer_alone_moves():
    model = build("cnn")
    spec = permutation_spec(model, torch.zeros(2, 1, 28, 28))
    base = dict(model.state_dict())
    near, newcomer = replies(spec, base, 2, moving=1)
    name = next(iter(base))  # rows of the first layer
    assert torch.allclose(near[name], base[name], atol=base[name].std().item())
    assert not torch.allclose(newcomer[name], base[name], atol=base[name].std().item())
