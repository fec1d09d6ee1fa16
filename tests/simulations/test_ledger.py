from __future__ import annotations

import json

import pytest

from c2m3_fl.errors import DataError
from simulations.ledger import Measurement, Record, append, finite, load, read_lines, save

ONE = Measurement({"start": "own"}, 0, "fedavg", (0.5, None), (1.5, None), (0.1, 0.2), 0.4, {"x": None}, (0.0, 0.25))


def test_a_record_comes_back_from_its_file(tmp_path):
    record = Record({"name": "x", "design": {"seeds": [0]}}, (ONE, ONE))
    save(record, tmp_path / "x.json")
    assert load(tmp_path / "x.json") == record
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_measurement_is_one_line_of_strict_json(tmp_path):
    save(Record({"name": "x"}, (ONE,)), tmp_path / "x.json")

    def refuse(constant):
        raise ValueError(constant)

    json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert (tmp_path / "x.json").read_text().count("fedavg") == 1


def test_lines_come_back_and_a_torn_one_is_left_out_but_spoils_no_later_one(tmp_path):
    file = tmp_path / "x.jsonl"
    assert read_lines(file) == ()
    append(ONE, file)
    with file.open("a") as stream:
        stream.write('{"cell": {"sta')
    append(ONE, file)
    assert read_lines(file) == (ONE, ONE)


def test_what_is_not_finite_is_none():
    assert [finite(value) for value in (0.123456, float("nan"), float("inf"), 12345.678)] == [
        0.12346,
        None,
        None,
        12346.0,
    ]


def test_drawing_before_running_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist: run the experiment before drawing it"):
        load(tmp_path / "none.json")
