"""The guard's first candidate in a round: what the wrapped strategy makes of the replies as they came."""

from __future__ import annotations

import logging

import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.metrics import report_candidate
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.reports import RecalibrationDecision, RecalibrationReport
from tests.flower.federation import calibration, clients, digits, mlp, reply, send

LABELLED = [tuple(each[:300] for each in digits())]


def _aggregated(wrapped: Strategy, recalibrate: object, data: list, replies: list) -> tuple[dict, dict]:
    strategy = C2M3(wrapped, model=mlp(), calibration=data, recalibrate=recalibrate, diagnostics=True)
    send(strategy, mlp().state_dict())
    arrays, metrics = strategy.aggregate_train(1, [reply(node, params) for node, params in enumerate(replies)])
    return to_params(arrays), dict(metrics)


@pytest.mark.parametrize("data", [LABELLED, calibration()], ids=["labels", "no labels"])
def test_the_plain_result_is_among_the_candidates(data: list) -> None:
    _, metrics = _aggregated(FedAvg(fraction_evaluate=0.0), "auto", data, clients(3))
    assert "c2m3-guard-kept/plain" in metrics


@pytest.mark.parametrize("wrapped", [FedAvg, FedMedian])
def test_its_accuracy_is_that_of_the_wrapped_strategy_without_alignment(wrapped: type[Strategy]) -> None:
    nodes = clients(3)
    _, metrics = _aggregated(wrapped(fraction_evaluate=0.0), "auto", LABELLED, nodes)
    stacked = {name: torch.stack([node[name] for node in nodes]) for name in nodes[0]}
    plain = weighted_mean(nodes) if wrapped is FedAvg else {n: v.median(0).values for n, v in stacked.items()}
    inputs, labels = LABELLED[0]
    logits = torch.func.functional_call(mlp(), plain, (inputs,))
    wanted = float((logits.argmax(1) == labels).double().mean())
    assert metrics["c2m3-guard-accuracy/plain"] == pytest.approx(wanted)


def test_comparing_leaves_no_trace_in_the_wrapped_strategy() -> None:
    def stepped(recalibrate: object) -> FedAdam:
        wrapped = FedAdam(fraction_evaluate=0.0)
        _aggregated(wrapped, recalibrate, LABELLED, clients(3))
        return wrapped

    compared, alone = stepped("auto"), stepped("repair")
    for key, value in alone.m_t.items():
        assert (compared.m_t[key] == value).all()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [("none", "the aggregate"), ("plain", "the aggregate without alignment"), ("repair", "'repair'")],
)
def test_the_log_names_what_the_guard_keeps_in_one_word(
    chosen: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flwr")
    decision = RecalibrationDecision(chosen, f"it agrees more than {chosen!r} does", None, ())
    report_candidate("auto", RecalibrationReport(chosen, (), (), decision=decision))
    assert caplog.messages == [f"\t> candidate 'auto': the guard keeps {words}: it agrees more than {words} does"]
