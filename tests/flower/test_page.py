"""The numbers of the page are those of the record."""

from __future__ import annotations

from tests.benchmarks.exchanges import RESULTS, table
from tests.benchmarks.records import read_record
from tests.benchmarks.still_rounds import RECORD as STILL
from tests.benchmarks.still_rounds import table as table_of_still_rounds
from tests.benchmarks.widths_rounds import RESULTS as WIDTHS
from tests.benchmarks.widths_rounds import Row
from tests.benchmarks.widths_rounds import table as table_of_widths


def test_the_table_of_exchanges_is_that_of_the_record():
    page = RESULTS.parent.parent / "README.md"
    assert table(read_record(RESULTS)["rows"]) in page.read_text(encoding="utf-8")


def test_the_table_of_widths_is_that_of_the_record():
    page = WIDTHS.parent.parent / "README.md"
    found = table_of_widths([Row(**row) for row in read_record(WIDTHS)["rows"]])
    assert found in page.read_text(encoding="utf-8")


def test_the_table_of_still_rounds_is_that_of_the_record():
    page = STILL.parent.parent / "README.md"
    assert table_of_still_rounds(read_record(STILL)["rows"]) in page.read_text(encoding="utf-8")
