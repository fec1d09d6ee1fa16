"""What is deployed around strategies that return float64, and what the metrics say of it."""

from __future__ import annotations

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, QFedAvg

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.deploying.test_candidates import app, deployed
from tests.flower.federation import EXAMPLE, calibration, digits_app, mlp, same

INSIDE = {
    "FedAvg": (lambda: FedAvg(fraction_evaluate=0.0), "float32"),
    "FedAdam": (lambda: FedAdam(fraction_evaluate=0.0), "float64"),
    "QFedAvg": (lambda: QFedAvg(client_learning_rate=0.1, q=0.01, fraction_evaluate=0.0), "float64"),
}


def indifferent():
    """Clients to whom all networks are alike."""
    found = digits_app(epochs=1, rate=0.02, evaluates="")

    @found.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return found


@pytest.mark.parametrize(("make", "precision"), INSIDE.values(), ids=INSIDE.keys())
@pytest.mark.parametrize("judge", [None, "auto"])
def test_an_aggregate_that_is_deployed_is_returned_as_it_is_and_not_counted_as_recalibrated(make, precision, judge):
    strategy = C2M3(make(), model=mlp(), calibration=calibration(), judge=judge)
    result = strategy.start(SerialGrid(indifferent(), 3), from_params(mlp().state_dict()), num_rounds=1)
    assert deployed(result, 1)[0] == "aggregate"
    assert result.train_metrics_clientapp[1]["c2m3-repaired"] == 0
    assert {array.dtype for array in result.arrays.values()} == {precision}
    assert same(result.arrays, strategy.trajectory)


@pytest.mark.parametrize(("make", "precision"), INSIDE.values(), ids=INSIDE.keys())
def test_a_head_is_counted_as_recalibrated_and_of_the_models_precision(make, precision):
    strategy = C2M3(make(), model=mlp(), example_inputs=EXAMPLE, head="labels", judge=None)
    result = strategy.start(SerialGrid(app(), 3), from_params(mlp().state_dict()), num_rounds=1)
    assert deployed(result, 1)[0] == "head"
    assert result.train_metrics_clientapp[1]["c2m3-repaired"] == 1
    assert {array.dtype for array in result.arrays.values()} == {"float32"}
    assert {array.dtype for array in strategy.trajectory.values()} == {precision}
