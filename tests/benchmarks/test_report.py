from __future__ import annotations

import re

import pytest

from tests.benchmarks import report
from tests.benchmarks.records import read_record

RECORDS = {name: read_record(part.record) for name, part in report.PARTS.items()}
ROWS = {name: record["rows"] for name, record in RECORDS.items()}


def test_the_table_of_aims_is_that_of_the_records() -> None:
    assert report.aims(ROWS) in report.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", report.PARTS)
def test_the_page_has_the_tables_of_every_record(name: str) -> None:
    text = report.whole(RECORDS)
    assert report.PARTS[name].table(RECORDS[name]["rows"]).strip() in text
    assert f"`{RECORDS[name]['command']}`, {RECORDS[name]['date']}." in text


def test_what_is_required_is_reached() -> None:
    required = ("no match slower than before", "the agreement of before", "above the published agreement")
    lines = [
        line for line in report.aims(ROWS).splitlines() if line.startswith(tuple(f"| {text}" for text in required))
    ]
    assert len(lines) == 4
    assert all(line.endswith("| reached |") for line in lines)


def test_an_aim_is_missed_where_a_measurement_falls_short() -> None:
    slower = [{**row, "now": row["before"], "before": row["now"]} for row in ROWS["solver"]]
    lines = report.aims({**ROWS, "solver": slower})
    assert re.search(r"no match slower than before \| .* \| \*\*missed\*\*", lines)
