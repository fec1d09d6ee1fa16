"""The acceptance rule on the digits, reduced: one seed, six rounds, every start, partition and number of epochs.

The whole of it, three seeds and fifteen rounds, is in simulations/README.md.
"""

from __future__ import annotations

from statistics import mean

import pytest

from simulations.design import load_design
from simulations.runner import run_design
from simulations.verdict import accuracies, at, cells, compare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run_design(load_design("digits", quick=True), tmp_path_factory.mktemp("digits"), workers=2)


def test_the_default_is_never_below_fedavg(record):
    broken = {str(cell): pair.broken for cell in cells(record) if (pair := _default(record, cell)).broken}
    assert broken == {}


def test_from_starts_of_their_own_the_default_is_far_above_fedavg(record):
    gains = [_default(record, cell).mean for cell in cells(record) if cell["start"] == "own"]
    assert mean(gains) > 0.1


def test_from_a_shared_start_the_default_trains_what_fedavg_trains(record):
    shared = [each for each in record.measurements if each.cell["start"] == "shared" and each.method == "c2m3+default"]
    unmoved = [each for each in shared if not any(each.moved)]
    assert len(unmoved) > len(shared) / 2
    for each in unmoved:
        (plain,) = at(record, each.cell, "fedavg")
        assert (each.trained, each.clients) == (0, plain.clients)


def test_what_clients_know_lifts_the_deployed_model_where_labels_are_skewed(record):
    skewed = [cell for cell in cells(record) if cell["partition"] == "two classes"]
    for cell in skewed:
        (plain,), (deployed,) = (accuracies(at(record, cell, name)) for name in ("fedavg", "c2m3+client-refit+head"))
        assert deployed > plain + 0.1, cell


def _default(record, cell):
    return compare(record, cell, "c2m3+default", "fedavg")
