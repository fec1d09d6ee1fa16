"""What clients write reaches the log on one line, escaped and cut, and never as a metric of ours."""

from __future__ import annotations

import logging

import pytest
from flwr.app import Array, Error, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.client_text import shown
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.incoming.replies import sort_messages
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, aggregate, answer, clients, digits_app, good, mlp, reply, with_array
from tests.flower.legacy_federation import fit_result, legacy

FORGED = "x\n\x1b[31mINFO :      [ROUND 9/9]\r\x08\u202e\u2028" + "y" * 100_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain: 'w' has shape (1,)", "plain: 'w' has shape (1,)"),
        ("größer als 1e3 × ∞", "größer als 1e3 × ∞"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x00\x7f", r"\x1b[2J\x00\x7f"),
        ("\u202eabc\u2028", r"\u202eabc\u2028"),
        ("\ud800", r"\ud800"),
    ],
)
def test_text_is_shown_on_one_printable_line(text, expected):
    assert shown(text) == expected
    assert shown(text).isprintable()


def test_long_text_is_cut_and_says_so():
    found = shown("é\n" * 10**6)
    assert found.isprintable()
    assert len(found) < 450
    assert found.endswith("… (2000000 characters)")


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def forgeries():
    """Client's text in every place of a reply where there is any."""
    params = clients(4)[3]
    yield with_array(reply(9, params), "2.bias", Array(FORGED, (32,), "numpy.ndarray", b""))
    yield with_array(reply(9, params), "2.bias", Array("float32", (32,), FORGED, b""))
    yield with_array(reply(9, params), FORGED, Array("float32", (32,), "numpy.ndarray", b""))
    yield with_array(reply(9, params), "2.bias", Array("float32", (32,), "numpy.ndarray", b"\x93NUMPY\n\x1b[31m"))
    yield answer(9, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FORGED))
    yield answer(9, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FORGED.replace("\n", "")))
    yield answer(9, RecordDict({"arrays": reply(9, params).content["arrays"], "metrics": MetricRecord({FORGED: 1.0})}))
    yield reply(9, params, metrics={FORGED: 1.0})
    yield reply(9, params, metrics={"list": [1.0] * 200_000})


def test_no_reply_forges_or_floods_the_log(caplog):
    forged = list(forgeries())
    _, metrics = aggregate([*good(), *forged])
    assert (metrics["c2m3-replies"], metrics["c2m3-dropped"]) == (3, len(forged))
    assert all(line.lstrip("\t").isprintable() and len(line) < 600 for line in lines(caplog))


def test_no_legacy_result_forges_the_log(caplog):
    fine = [fit_result(node, params) for node, params in enumerate(clients(3))]
    _, metrics = legacy().aggregate_fit(1, [*fine, fit_result(9, clients(4)[3], metrics={FORGED: 1.0})], [])
    assert metrics["c2m3-dropped"] == 1
    assert all(line.lstrip("\t").isprintable() and len(line) < 600 for line in lines(caplog))


def test_no_evaluation_and_no_failure_of_the_strategy_forges_the_log(caplog):
    def failing(records, weight):
        raise ValueError(FORGED)

    evaluation = RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": 1.0})})
    strategy = C2M3(FedAvg(evaluate_metrics_aggr_fn=failing), model=mlp(), example_inputs=EXAMPLE)
    bad = answer(9, RecordDict({"metrics": MetricRecord({"num-examples": 1, FORGED: 1.0})}))
    assert strategy.aggregate_evaluate(1, [answer(1, evaluation), answer(2, evaluation), bad]) is None
    assert any("failed: ValueError: x" in line for line in lines(caplog))
    assert all(line.lstrip("\t").isprintable() and len(line) < 600 for line in lines(caplog))


def failing_app() -> ClientApp:
    """Clients that train, and fail in whatever else they are asked."""
    app = digits_app(independent=True, epochs=1, evaluates="")

    def fail(message, context):
        raise RuntimeError(FORGED.replace("\n", "").replace("\r", "").replace("\u2028", ""))

    app.evaluate()(fail)
    for action in ("c2m3_statistics", "c2m3_sums", "c2m3_labels"):
        app.query(action)(fail)
    return app


@pytest.mark.parametrize(
    "options", [{"calibration": ClientStatistics()}, {"recalibrate": ClientRefit()}, {"head": "labels"}]
)
def test_no_answer_to_a_query_and_no_judgement_forges_the_log(options, caplog):
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, judge="clients", **options)
    strategy.start(SerialGrid(failing_app(), 2), from_params(mlp().state_dict()), num_rounds=1)
    said = [line for line in lines(caplog) if "RuntimeError: x" in line]
    assert said
    assert all(line.lstrip("\t").isprintable() and len(line) < 1200 for line in said)


def test_metrics_that_begin_like_ours_are_not_the_clients_to_set():
    claimed = {"c2m3-kept-previous": 1.0, "c2m3-repaired": 1.0, "loss": 2.0}
    _, metrics = aggregate([reply(node, params, metrics=claimed) for node, params in enumerate(clients(3))])
    assert (metrics["c2m3-kept-previous"], metrics["loss"]) == (0, 2.0)
    assert "c2m3-repaired" not in metrics
    record = MetricRecord({"num-examples": 1, "accuracy": 0.5, "c2m3-evaluations-dropped": 7.0})
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    found = strategy.aggregate_evaluate(1, [answer(node, RecordDict({"metrics": record})) for node in range(2)])
    assert dict(found) == {"accuracy": 0.5}


def test_legacy_metrics_that_begin_like_ours_are_not_the_clients_to_set():
    from flwr.server.strategy import FedAvg as Legacy  # beside the current one

    inside = Legacy(fit_metrics_aggregation_fn=lambda found: {key: 1.0 for _, metrics in found for key in metrics})
    claimed = {"c2m3-repaired": 1.0, "loss": 2.0}
    results = [fit_result(node, params, metrics=claimed) for node, params in enumerate(clients(3))]
    _, metrics = legacy(inside).aggregate_fit(1, results, [])
    assert metrics["loss"] == 1.0
    assert "c2m3-repaired" not in metrics


def test_the_reason_for_a_dropped_reply_is_one_line_already():
    (bad, *_) = forgeries()
    (dropped,) = sort_messages([bad], {}, weighted_by="num-examples").dropped
    assert dropped.reason.isprintable()
