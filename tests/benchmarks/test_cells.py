from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.benchmarks.cells import Cells, Layout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    case: str
    seed: int
    value: float

    @property
    def cell(self):
        return self.case, self.seed


LAYOUT = Layout("python -m x", {"epochs": 3}, Row, lambda row: (row.case, row.seed))


def test_a_failed_cell_ends_no_run_and_is_measured_by_the_next_one_alone(tmp_path, capsys):
    file, measured = tmp_path / "record.json", []

    def rows(cell):
        measured.append(cell)
        if cell == ("a", 1) and len(measured) < 4:
            raise RuntimeError("out of luck")
        return [Row(*cell, value=0.5)]

    cells = [("a", 0), ("a", 1), ("b", 0)]
    with pytest.raises(SystemExit, match="1 of 3 cells failed"):
        Cells.read(LAYOUT, file).measure(cells, rows, file, CPU)
    assert "out of luck" in capsys.readouterr().err
    done = Cells.read(LAYOUT, file).measure(cells, rows, file, CPU)
    assert measured == [*cells, ("a", 1)]
    assert [row.cell for row in done.rows] == cells == [row.cell for row in Cells.read(LAYOUT, file).rows]


def test_records_of_several_runs_are_joined_and_every_case_names_its_machine(tmp_path):
    one = Cells(LAYOUT).measure([("b", 0), ("a", 0)], lambda cell: [Row(*cell, value=0.1)], tmp_path / "one", CPU)
    two = Cells(LAYOUT).measure([("a", 0), ("a", 1)], lambda cell: [Row(*cell, value=0.2)], tmp_path / "two", CPU)
    both = Cells.read(LAYOUT, tmp_path / "one").joined(Cells.read(LAYOUT, tmp_path / "two"))
    assert [row.value for row in both.rows] == [0.2, 0.2, 0.1]
    assert both.measured.keys() == {"a", "b"} == one.joined(two).measured.keys()
    assert both.measured["a"]["accelerator"] == "none"
