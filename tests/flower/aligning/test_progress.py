"""What the log says during a match: every step at DEBUG, a line every few seconds at INFO."""

from __future__ import annotations

from logging import DEBUG, INFO

import pytest

from c2m3_fl.core.result import Step
from c2m3_fl.flower.aligning.progress import MatchLog


def told(caplog, moments):
    """The records of a match whose steps come at these moments, in seconds."""
    clock = iter([0.0, *moments])
    match_log = MatchLog(1e-3, lambda: next(clock))
    with caplog.at_level(DEBUG, logger="flwr"):
        for number, _ in enumerate(moments, start=1):
            match_log(Step(number, 2.5, 10.0**-number, 10.0 ** -(number + 1), 1.0, 0.5, 3, number))
    return caplog.records


def test_a_short_match_is_silent_but_for_those_who_debug(caplog):
    records = told(caplog, [1.0, 2.0, 4.9])
    assert [record.levelno for record in records] == [DEBUG] * 3


@pytest.mark.parametrize(("moments", "lines"), [([1.0, 6.0, 7.0], 1), ([6.0, 12.0, 13.0], 2), ([20.0, 21.0, 40.0], 2)])
def test_a_long_match_has_a_line_every_few_seconds(caplog, moments, lines):
    records = told(caplog, moments)
    assert sum(record.levelno == INFO for record in records) == lines
    assert sum(record.levelno == DEBUG for record in records) == len(moments)


def test_the_line_says_nodes_pass_agreement_gap_and_the_rest(caplog):
    # Gains 1e-2 to 1e-3 of 1e-2 to 1e-4: half of the ascent is done after six seconds.
    (line,) = (record.getMessage() for record in told(caplog, [1.0, 6.0]) if record.levelno == INFO)
    assert line.strip() == "> matching 3 nodes for 6 s: pass 2, agreement 2.5, gap 1.0e-02, about 6 s to go"


def test_sweeps_have_a_gain_and_reheatings_are_named(caplog):
    clock = iter([0.0, 1.0, 9.0])
    match_log = MatchLog(1e-3, lambda: next(clock))
    with caplog.at_level(INFO, logger="flwr"):
        match_log(Step(1, 2.5, 0.1, 0.1, 1.0, 0.5, 5, 100))
        match_log(Step(1, 2.4, None, 0.02, 1.0, 0.5, 5, 150, trial=True))
    (line,) = caplog.messages
    assert "matching 5 nodes for 9 s: reheating, pass 1, agreement 2.4, gain 2.0e-02" in line
