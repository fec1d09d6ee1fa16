"""The reduced form of every experiment runs, and its record can be drawn."""

from __future__ import annotations

import pytest

from simulations import grid_pictures, grid_tables, method_pictures
from simulations.design import load_design, names
from simulations.ledger import load
from simulations.runner import result_file, run_design
from simulations.verdict import one_round

ELSEWHERE = ("digits",)  # tests/simulations/test_digits_acceptance.py runs it

pytestmark = [pytest.mark.slow, pytest.mark.data]


@pytest.mark.parametrize("name", [name for name in names() if name not in ELSEWHERE])
def test_the_reduced_experiment_runs_and_is_drawn(name, tmp_path):
    design = load_design(name, quick=True)
    run_design(design, tmp_path)
    record = load(result_file(design, tmp_path))
    assert len(record.measurements) == sum(len(cell.methods) for cell in design.cells) * len(design.seeds)
    for each in record.measurements:
        assert None not in (*each.accuracy, *each.loss)
    assert design.title in grid_tables.markdown(record)
    picture = tmp_path / "picture.png"
    (method_pictures if one_round(record) else grid_pictures).draw(record, picture)
    assert picture.stat().st_size > 0
