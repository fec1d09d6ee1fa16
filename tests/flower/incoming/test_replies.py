"""Evaluations are checked like training replies: a bad one is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, answer, mlp

BAD_NODE = 9


def evaluation(node: int, **metrics: float) -> Message:
    return answer(node, RecordDict({"metrics": MetricRecord({key.replace("_", "-"): v for key, v in metrics.items()})}))


EVALUATIONS: dict[str, tuple[Callable[[], Message], str]] = {
    "weight missing": (lambda: evaluation(BAD_NODE, accuracy=0.1), "weight 'num-examples' is missing"),
    "weight zero": (lambda: evaluation(BAD_NODE, num_examples=0, accuracy=0.1), "'num-examples' is 0"),
    "weight NaN": (lambda: evaluation(BAD_NODE, num_examples=math.nan, accuracy=0.1), "'num-examples' is nan"),
    "other metrics": (lambda: evaluation(BAD_NODE, num_examples=1, score=0.1), "differ from the majority's"),
    "no metrics": (lambda: answer(BAD_NODE, RecordDict()), "0 MetricRecords"),
    "error": (lambda: answer(BAD_NODE, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no data")), "no data"),
}


@pytest.mark.parametrize(("make", "reason"), EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_a_bad_evaluation_is_dropped_and_logged_and_changes_nothing(make, reason, caplog):
    fine = [evaluation(node, num_examples=1 + node, accuracy=0.1 * node) for node in range(3)]
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    expected = strategy.aggregate_evaluate(1, fine)
    found = strategy.aggregate_evaluate(1, [make(), *reversed(fine)])
    assert found == {**expected, "c2m3-evaluations-dropped": 1}
    (line,) = [text for text in caplog.messages if "dropped the reply" in text]
    assert f"node {BAD_NODE}" in line
    assert reason in line


def test_without_a_usable_evaluation_the_round_has_none():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    assert strategy.aggregate_evaluate(1, [evaluation(node, num_examples=0, accuracy=1.0) for node in range(2)]) is None
