from __future__ import annotations

from pathlib import Path

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Group, PermutationSpec, Segment, TensorSpec
from simulations.grid_tables import page
from tests.benchmarks import federations, figures, figures_picture, questions, questions_picture
from tests.benchmarks.records import read_record

SPEC = PermutationSpec({"g": Group(6)}, {"w": TensorSpec((6,), ((Segment.contiguous("g", 6),),))})
README = Path("simulations/README.md")


def _drawn(count):
    return [permutation.random(SPEC, torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_around_a_cycle_of_one_universe_no_unit_is_astray():
    a, b, c = _drawn(3)
    around = [permutation.between(a, b), permutation.between(b, c), permutation.between(c, a)]
    assert figures.astray(SPEC, around) == 0


def test_a_swap_on_the_way_leaves_two_units_astray():
    a, b, c = _drawn(3)
    swap = {"g": torch.tensor([1, 0, 2, 3, 4, 5])}
    around = [
        permutation.between(a, b),
        permutation.compose(swap, permutation.between(b, c)),
        permutation.between(c, a),
    ]
    assert figures.astray(SPEC, around) == pytest.approx(2 / 6)


def test_partners_do_not_depend_on_the_order_of_units_in_the_universe():
    perms, (relabel,) = _drawn(3), _drawn(1)
    assert questions.same_partners(SPEC, perms, [permutation.compose(relabel, each) for each in perms]) == 1.0
    assert questions.same_partners(SPEC, perms, [*perms[:2], permutation.identity(SPEC)]) < 1.0


def test_the_spread_over_random_orders_is_within_a_set_of_networks():
    rows = [
        {"figure": "order", "seed": seed, "x": str(order), "series": "MergeMany", "value": 0.5 * seed + 0.1 * order}
        for seed in (0, 1)
        for order in (0, 1, 2)
    ]
    assert "| MergeMany | 0.350 | 0.1000 | 0.2000 |" in figures_picture.tables(rows)


@pytest.mark.parametrize(
    ("file", "tables"),
    [
        (figures.RESULTS, figures_picture.tables),
        (questions.RESULTS, questions_picture.tables),
        (federations.RESULTS, federations.table),
    ],
)
def test_the_page_shows_the_tables_of_the_records(file, tables):
    text = README.read_text()
    assert f"<!-- results: {file.stem} -->" in text
    assert page(text, file.stem, tables(read_record(file)["rows"]) + "\n") == text
