"""What the judging clients' messages hold, and what too few of them decide."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport
from tests.flower.deploying.test_candidates import Around, app, deployed
from tests.flower.federation import (
    EXAMPLE,
    accuracy,
    answering,
    calibration,
    digits,
    digits_app,
    good,
    mlp,
    same,
    send,
)

START = from_params(mlp().state_dict())


@pytest.mark.parametrize("judge", ["clients", "auto"])
@pytest.mark.parametrize("silent", [(), (2,)], ids=["both answer", "one is silent"])
def test_one_client_that_judges_alone_installs_nothing(silent, judge):
    """One of two that fails is one that would have to agree."""
    own = answering(app=digits_app(epochs=1, rate=0.02, evaluates=""), first_layer=True)

    @own.evaluate()
    def evaluate(message, context):
        if context.node_id in silent:
            raise RuntimeError("no evaluation today")
        found = message.content["arrays"]["4.weight"].numpy()
        aggregate = first.setdefault("aggregate", found)  # it is sent before the others
        loss = 1.0 if (found == aggregate).all() else 9.0
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 10, "loss": loss})}), reply_to=message)

    first = {}
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, judge=judge)
    result = strategy.start(SerialGrid(own, 2), START, num_rounds=1)
    assert deployed(result, 1)[0] == "aggregate"


def test_clients_judge_candidates_in_the_order_of_units_of_their_own_replies():
    evaluations = {}

    class Noting(SerialGrid):
        def push_messages(self, messages):
            messages = list(messages)
            for each in messages:
                if each.metadata.message_type == "evaluate":
                    evaluations.setdefault(each.metadata.dst_node_id, []).append(each.content["arrays"])
            return super().push_messages(messages)

    strategy = C2M3(FedAvg(), model=mlp(), example_inputs=EXAMPLE, basis="client")
    strategy.start(Noting(app(independent=True), 3), START, num_rounds=1)
    first, second, *_ = evaluations.values()
    assert len(first) > 2
    for own, other in zip(first, second, strict=True):
        assert not same(own, other)
        assert accuracy(mlp, own) == pytest.approx(accuracy(mlp, other), abs=0.01)


@pytest.mark.parametrize("factor", [1, 255])
def test_labels_choose_on_inputs_of_another_range_and_the_clients_refuse(factor, caplog):
    data, labels = (each[1200:1500] for each in digits())
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=[(factor * data, labels)])
    result = strategy.start(SerialGrid(app(independent=True, epochs=2, rate=0.1), 5), START, num_rounds=1)
    assert deployed(result, 1)[0] == ("auto" if factor == 1 else "aggregate")
    assert ("judge: 'aggregate' is deployed" in caplog.text) == (factor == 255)
    assert accuracy(mlp, result.arrays) > 0.3  # with what was fitted to inputs of the other range .1


def rounds_asked(wrapped, total, start=START):
    """In which rounds of a run the clients are asked, what round 1 sent, and the result."""
    current, asked, sent = [0], set(), []

    class Noting(SerialGrid):
        def push_messages(self, messages):
            messages = list(messages)
            kind = messages[0].metadata.message_type if messages else ""
            current[0] += kind == "train"
            if kind == "train" and not sent:
                sent.append(messages[0].content["arrays"])
            if kind.startswith("query"):
                asked.add(current[0])
            return super().push_messages(messages)

    result = wrapped.start(Noting(app(), 3), start, num_rounds=total)
    return asked, sent[0], result


def test_a_run_that_nobody_announces_after_one_that_was_is_another_one():
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, head="labels", judge=None)
    asked, _, first = rounds_asked(strategy, 1)
    assert asked == {1}
    assert not same(first.arrays, strategy.trajectory), "the trajectory of a run that is over can be read"
    asked, sent, _ = rounds_asked(Around(strategy), 3, first.arrays)
    assert asked == {1, 2, 3}, "the number of rounds is unknown"
    assert same(sent, first.arrays), "it trains from what it is given"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_recalibrated_model_that_is_not_finite_ends_the_feedback(value, caplog):
    def spoiled(setting):
        params = {name: tensor + value for name, tensor in setting.merged.items()}
        return Recalibrated(params, RecalibrationReport("spoiled"))

    strategy = C2M3(model=mlp(), calibration=calibration(), recalibrate=spoiled, feedback="always")
    send(strategy, mlp().state_dict())
    arrays, metrics = strategy.aggregate_train(1, good())
    assert same(arrays, strategy.trajectory)
    assert not metrics.get("c2m3-fed-back")
    assert strategy.server.models.stopped
    assert "is not finite: clients do not train it any more" in caplog.text
    assert all(torch.isfinite(each).all() for each in strategy.server.models.trajectory.values())
