from __future__ import annotations

from math import inf

import pytest

from simulations.ledger import Measurement, Record
from simulations.verdict import Pair, accuracies, at, cells, compare, methods

DESIGN = {"axes": {"start": {"shared": {}, "own": {}}}, "baseline": "fedavg", "judged": "c2m3", "drawn": ["fedavg"]}


def measured(start, seed, method, accuracy, loss=1.0):
    return Measurement({"start": start}, seed, method, (0.1, accuracy), (2.0, loss), (0.3,), 0.5)


RECORD = Record(
    {"design": DESIGN},
    (
        measured("own", 1, "c2m3", 0.62, 0.5),
        measured("own", 0, "c2m3", 0.5, 0.5),
        measured("own", 0, "fedavg", 0.4, 2.0),
        measured("own", 1, "fedavg", 0.6, 2.0),
        measured("shared", 0, "fedavg", 0.8, 1.0),
    ),
)
OWN, SHARED = {"start": "own"}, {"start": "shared"}


def test_gains_are_paired_by_seed():
    pair = compare(RECORD, OWN, "c2m3", "fedavg")
    assert pair.gains == pytest.approx((0.1, 0.02))
    assert pair.mean == pytest.approx(0.06)
    assert pair.least == pytest.approx(0.02)
    assert pair.loss_ratio == 0.25


def test_a_method_against_itself_gains_nothing():
    pair = compare(RECORD, OWN, "fedavg", "fedavg")
    assert pair == Pair((0.0, 0.0), 1.0)
    assert pair.broken == ()


def test_nothing_is_compared_where_a_method_did_not_run():
    assert compare(RECORD, SHARED, "c2m3", "fedavg") is None


def test_cells_come_in_the_order_of_the_design_and_seeds_in_their_own():
    assert cells(RECORD) == [SHARED, OWN]
    assert methods(RECORD) == ["c2m3", "fedavg"]
    assert accuracies(at(RECORD, OWN, "c2m3")) == [0.5, 0.62]


@pytest.mark.parametrize(
    ("pair", "broken"),
    [
        (Pair((0.1, -0.03), 1.05), ()),
        (Pair((-0.01, -0.01), 1.0), ()),
        (Pair((-0.02, -0.02), 1.0), ("mean",)),
        (Pair((0.5, -0.031), 1.0), ("seed",)),
        (Pair((0.5, 0.5), 1.06), ("loss",)),
        (Pair((-0.5, -0.5), inf), ("mean", "seed", "loss")),
    ],
)
def test_the_rule_names_its_broken_parts(pair, broken):
    assert pair.broken == broken


@pytest.mark.parametrize(("ours", "theirs", "ratio"), [(None, 1.0, inf), (None, None, 1.0), (1.0, None, 0.0)])
def test_a_loss_that_is_not_finite_is_the_largest(ours, theirs, ratio):
    record = Record(
        {"design": DESIGN}, (measured("own", 0, "c2m3", 0.1, ours), measured("own", 0, "fedavg", 0.1, theirs))
    )
    assert compare(record, OWN, "c2m3", "fedavg").loss_ratio == ratio
