"""Answers that are no moments, and answers that are missing, cost a repair their client at most."""

from __future__ import annotations

import math

import pytest
import torch

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.moments import ACTION
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.serial_grid import SerialGrid
from tests.flower.federation import answering, digits_app, same
from tests.flower.queries.repairs import run


def of_another_subject(replies):
    """Node 2 answers about the endpoint of another client, which nobody asked it for."""
    for each in replies:
        about = each.metadata.group_id
        if each.metadata.message_type == f"query.{ACTION}" and each.metadata.src_node_id == 2 and about != "merged":
            each.metadata.__dict__["_group_id"] = str((int(about) + 1) % 4)
    return replies


def test_an_answer_that_nobody_asked_for_is_not_believed(caplog):
    app = answering(app=digits_app(independent=True, epochs=3))
    result = run(SerialGrid(app, 4, transit=of_another_subject), calibration=ClientStatistics())
    assert result.train_metrics_clientapp[1]["c2m3-repaired"] == 1
    assert any("no moments from node 2: an answer about " in text for text in caplog.messages)


def test_clients_without_the_handler_cost_the_repair_not_the_round(caplog):
    app = digits_app(independent=True, epochs=2)
    result = run(SerialGrid(app, 4), calibration=ClientStatistics())
    assert [metrics["c2m3-repaired"] for metrics in result.train_metrics_clientapp.values()] == [0, 0]
    assert any(
        "add answer_statistics to its app" in text and "the first reply: the client failed" in text
        for text in caplog.messages
    )
    assert same(result.arrays, run(SerialGrid(app, 4), recalibrate=None).arrays)


def corrupt(harm):
    """Break every answer of node 2 to a query."""

    def transit(replies):
        for each in replies:
            if each.metadata.message_type == f"query.{ACTION}" and each.metadata.src_node_id == 2:
                arrays = to_params(each.content["moments"])
                each.content["moments"] = from_params({name: harm(name, value) for name, value in arrays.items()})
        return replies

    return transit


HARM = {
    "NaN": lambda name, value: value * math.nan if name.endswith("mean") else value,
    "negative spread": lambda name, value: value - 1e9 if name.endswith("deviation") else value,
    "no inputs": lambda name, value: value * 0 if name.endswith("count") else value,
    "more inputs than can be": lambda name, value: value * 0 + 2**60 if name.endswith("count") else value,
    "a count in floats": lambda name, value: value * 1e300 if name.endswith("count") else value,
    "a mean beyond float32": lambda name, value: value * 1e200 if name.endswith("mean") else value,
    "other shape": lambda name, value: value[:1] if value.ndim else value,
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_answers_that_are_no_moments_are_left_out(harm, caplog):
    def app():
        return answering(app=digits_app(independent=True, epochs=3))

    result = run(SerialGrid(app(), 4, transit=corrupt(harm)), calibration=ClientStatistics())
    assert result.train_metrics_clientapp[1]["c2m3-repaired"] == 1
    assert any("no moments from node 2" in text for text in caplog.messages)
    assert all(torch.isfinite(value).all() for value in to_params(result.arrays).values())


def test_answers_that_go_missing_are_left_out():
    def transit(replies):
        query = [each for each in replies if each.metadata.message_type == f"query.{ACTION}"]
        return [each for each in replies if each not in query[:1]]

    app = answering(app=digits_app(independent=True, epochs=3))
    result = run(SerialGrid(app, 4, transit=transit), calibration=ClientStatistics())
    assert result.train_metrics_clientapp[2]["c2m3-repaired"] == 1
