"""The numbers of the page are those of the record."""

from __future__ import annotations

from tests.benchmarks.exchanges import RESULTS, table
from tests.benchmarks.records import read_record


def test_the_table_of_exchanges_is_that_of_the_record():
    page = RESULTS.parent.parent / "README.md"
    assert table(read_record(RESULTS)["rows"]) in page.read_text(encoding="utf-8")
