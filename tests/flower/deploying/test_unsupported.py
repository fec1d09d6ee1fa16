"""A recalibration that the evidence does not support is no failure."""

from __future__ import annotations

from logging import ERROR

import pytest

from c2m3_fl.flower.queries.repair import ClientStatistics
from tests.flower.deploying.test_candidates import app, deployed, played
from tests.flower.federation import calibration, same

UNLIKE = [batch.roll(1, 1) for batch in calibration()]  # digits shifted by a pixel


@pytest.mark.parametrize("judge", [None, "auto"])
def test_where_nothing_moved_and_the_data_are_unlike_the_clients_there_is_no_candidate_and_no_failure(judge, caplog):
    options = {"calibration": UNLIKE, "moments": ClientStatistics(), "head": None, "judge": judge}
    strategy, result, _ = played(options, clients_app=app())
    assert same(result.arrays, strategy.trajectory)
    assert {each["c2m3-failed-candidates"] for each in result.train_metrics_clientapp.values()} == {0}
    assert not [each for each in caplog.records if each.levelno >= ERROR]
    told = [text for text in caplog.messages if "no candidate 'auto': no unit moved, and REPAIR alone is left" in text]
    assert len(told) == 2  # once a round
    assert deployed(result, 2)[0] == "aggregate"
