from __future__ import annotations

from tests.benchmarks.merging_rows import Row
from tests.benchmarks.published_merges import published_tables


def test_methods_are_rows_cases_columns_and_the_largest_number_of_nodes_comes_first():
    rows = [
        Row(case, seed, column, accuracy + 0.1 * seed, 1.0)
        for case, seeds in (("A", (0, 1)), ("B", (0,)))
        for seed in seeds
        for column, accuracy in (
            ("2 nodes: mean node", 0.5),
            ("2 nodes: c2m3 + REPAIR", 0.4),
            ("5 nodes: mean node", 0.5),
            ("5 nodes: c2m3 + REPAIR", 0.3),
        )
    ]
    five, two = published_tables(rows).split("\n\n")
    assert five.splitlines() == [
        "| 5 nodes | A | B |",
        "| --- | ---: | ---: |",
        "| mean node | 55.0 ± 7.1 | 50.0 |",
        "| c2m3 + REPAIR | 35.0 ± 7.1 (0.64) | 30.0 (0.60) |",
    ]
    assert two.startswith("| 2 nodes | A | B |")
