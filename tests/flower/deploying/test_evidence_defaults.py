"""What decides by default: labels that say something, as many judges as are needed, the clients of this very run."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.deploying.test_candidates import HELD, app, deployed, played
from tests.flower.federation import EXAMPLE, answering, calibration, digits_app, mlp


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize(("model", "shift"), [(regressor(), 0), (mlp(), 9), (mlp(), -100)])
def test_labels_that_are_no_classes_of_the_outputs_decide_nothing(model, shift, caplog):
    data = [(each, torch.arange(len(each)) % 10 + shift) for each in calibration()]
    setup = C2M3(model=model, calibration=data).setup
    assert (setup.data.labelled, setup.data.inputs) == (False, 400)
    assert any("decide nothing" in text for text in caplog.messages)
    assert setup.describe().endswith("the clients judge the candidates, where they can")


def test_labels_that_are_classes_decide():
    data = [(each, torch.arange(len(each)) % 10) for each in calibration()]
    assert C2M3(model=mlp(), calibration=data).setup.data.labelled


def test_where_labels_judge_a_head_that_contradicts_them_is_not_deployed():
    inputs, labels = HELD[0]
    data = [(inputs, labels.roll(1))]  # every example has its neighbour's
    _, result, _ = played({"head": "labels", "judge": "labels", "calibration": data}, rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert deployed(result, 1)[0] == "aggregate"
    assert metrics["c2m3-judge-loss/head"] > metrics["c2m3-judge-loss/aggregate"]


def test_two_clients_that_answer_choose_no_temperature_however_many_were_asked():
    def of_two(replies):
        judging = [each for each in replies if each.metadata.message_type == "evaluate"]
        return [each for each in replies if each not in judging or each.metadata.src_node_id < 3]

    for transit, expected in ((None, True), (of_two, False)):
        _, result, _ = played({"calibration": calibration()}, rounds=1, transit=transit, clients_app=app())
        assert ("c2m3-temperature" in result.train_metrics_clientapp[1]) == expected


def test_a_second_run_asks_its_own_clients_for_a_head():
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE)
    found = []
    for answers in (False, True):
        clients = digits_app(epochs=1, rate=0.02, evaluates="loss")
        grid = SerialGrid(answering(app=clients) if answers else clients, 3)
        result = strategy.start(grid, ArrayRecord(mlp().state_dict()), num_rounds=1)
        found.append("c2m3-deployed/head" in result.train_metrics_clientapp[1])
    assert found == [False, True]
