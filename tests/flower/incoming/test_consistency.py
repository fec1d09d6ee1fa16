"""Record names, metrics and evaluations: no name that one client chooses decides, and no NaN enters an average."""

from __future__ import annotations

import math

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.common import EvaluateRes
from flwr.server.strategy import FedAvg as LegacyFedAvg

from c2m3_fl.flower.incoming.consistency import consistent, fill, finite
from c2m3_fl.flower.incoming.records import from_params, schema_of
from c2m3_fl.flower.incoming.replies import sort_messages
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, aggregate, answer, clients, mlp, reply, same
from tests.flower.legacy_federation import OK, Local, legacy

HONEST = {"num-examples": 10, "loss": 1.0}


def named(node: int, arrays: str = "arrays", metrics: str = "metrics", **values: float) -> Message:
    record = MetricRecord({**HONEST, **values})
    return answer(node, RecordDict({arrays: from_params(clients(2)[node % 2]), metrics: record}))


def sorted_of(*messages: Message):
    return sort_messages(messages, schema_of(from_params(mlp().state_dict())), weighted_by="num-examples")


ATTACKS = {
    "another metric": {"aaa": 1.0},
    "arrays named first": {"arrays": "A"},
    "arrays named last": {"arrays": "zzz"},
    "metrics named first": {"metrics": ""},
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_with_two_clients_a_name_that_one_of_them_chooses_drops_nobody(attack):
    found = sorted_of(named(0), named(1, **attack))
    assert sorted(each.node for each in found.replies) == [0, 1]
    kinds = {(tuple(each.source.content.array_records), *each.source.content["metrics"]) for each in found.replies}
    assert kinds == {(("arrays",), "num-examples", "loss")}


def test_with_two_clients_of_other_names_the_average_is_that_of_both(caplog):
    expected, _ = aggregate([named(0), named(1)])
    arrays, metrics = aggregate([named(0), named(1, arrays="A", aaa=1.0)])
    assert same(arrays, expected)
    assert (metrics["c2m3-replies"], metrics["loss"]) == (2, 1.0)
    assert "aaa" not in metrics
    assert any("without a majority: 2 metrics are common" in text for text in caplog.messages)


def test_a_majority_drops_the_others_and_a_tie_of_four_drops_nobody():
    found = sorted_of(named(0), named(1), named(2, surprise=1.0))
    assert [each.node for each in found.dropped] == [2]
    tie = [named(0), named(1), named(2, surprise=1.0), named(3, surprise=1.0)]
    assert len(sorted_of(*tie).replies) == 4
    assert consistent([]) == ([], [])


def test_metrics_that_one_of_two_clients_lacks_are_not_averaged():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    honest = RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": 0.5})})
    other = RecordDict({"aaa": MetricRecord({"num-examples": 3, "a": 1.0, "accuracy": 0.9})})
    assert dict(strategy.aggregate_evaluate(1, [answer(0, honest), answer(1, other)])) == {
        "accuracy": pytest.approx(0.8)
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [0.5, math.nan], 10**400])
def test_evaluations_that_are_not_finite_are_dropped_and_counted(value, caplog):
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    listed = isinstance(value, list)
    good = {"num-examples": 1, "accuracy": [0.5, 0.5] if listed else 0.5}
    fine = [answer(node, RecordDict({"metrics": MetricRecord(dict(good))})) for node in range(3)]
    bad = answer(9, RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": value})}))
    found = strategy.aggregate_evaluate(1, [*fine, bad])
    assert found == {**strategy.aggregate_evaluate(1, fine), "c2m3-evaluations-dropped": 1}
    assert any("node 9: metric 'accuracy' is" in text for text in caplog.messages)


EVALUATIONS = {
    "loss NaN": EvaluateRes(OK, math.nan, 10, {"accuracy": 0.1}),
    "loss infinite": EvaluateRes(OK, math.inf, 10, {"accuracy": 0.1}),
    "no examples": EvaluateRes(OK, 1.0, 0, {"accuracy": 0.1}),
    "claim": EvaluateRes(OK, 1.0, 10**300, {"accuracy": 0.1}),
    "metric NaN": EvaluateRes(OK, 1.0, 10, {"accuracy": math.nan}),
    "a name of ten thousand": EvaluateRes(OK, 1.0, 10, {"a" * 10_000: 0.1}),
}


@pytest.mark.parametrize("bad", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_legacy_evaluations_that_cannot_be_averaged_are_dropped_and_counted(bad):
    def mean(found):
        return {"accuracy": sum(n * each["accuracy"] for n, each in found) / sum(n for n, _ in found)}

    ours = legacy(LegacyFedAvg(evaluate_metrics_aggregation_fn=mean))
    fine = [(Local(node, 1), EvaluateRes(OK, 1.0 + node, 10, {"accuracy": 0.5})) for node in range(3)]
    loss, metrics = ours.aggregate_evaluate(1, [*fine, (Local(9, 1), bad)], [])
    assert (loss, metrics) == (2.0, {"accuracy": 0.5, "c2m3-evaluations-dropped": 1})
    assert ours.aggregate_evaluate(1, fine, []) == (2.0, {"accuracy": 0.5})


def test_a_mean_that_lacks_values_is_the_mean_of_all():
    records = [
        {"a": 1.0, "b": [1.0, 2.0], "c": math.nan, "d": "text"},
        {"a": math.nan, "b": [math.nan, 0.0], "c": math.inf},
    ]
    found, count = fill([*records, {"a": 4.0, "b": [3.0, 4.0]}], [1.0, 5.0, 2.0])
    assert count == 4
    assert [each["a"] for each in found] == [1.0, 3.0, 4.0]
    assert found[1]["b"] == pytest.approx([7 / 3, 10 / 3])
    assert all("c" not in each for each in found)
    assert found[0]["d"] == "text"
    assert records[1]["b"][1] == 0.0, "the records are not changed"


@pytest.mark.parametrize(("value", "expected"), [(1, True), ("nan", True), ([], True), ([1, math.nan], False)])
def test_numbers_and_lists_of_them_are_finite_or_not(value, expected):
    assert finite(value) == expected


def test_metrics_that_are_nan_do_not_reach_the_aggregate():
    _, metrics = aggregate([reply(n, clients(2)[n], metrics={"loss": [1.0, math.nan][n]}) for n in range(2)])
    assert metrics["loss"] == 1.0
