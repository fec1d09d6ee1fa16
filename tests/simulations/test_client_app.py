from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.client_app import app
from simulations.data import federated_data
from simulations.models import build_model
from simulations.partition_grid import PartitionGrid
from simulations.settings import Settings
from simulations.training import log_probabilities, score

SETTINGS = Settings(hidden_widths="8", clients=3, holdout=0.25, local_epochs=1)
MODEL = build_model(SETTINGS, (1, 8, 8), 10, seed=0)


def _ask(kind, nodes=SETTINGS.clients):
    grid = PartitionGrid(SerialGrid(app, nodes, run_config=SETTINGS.to_run_config()), SETTINGS.clients)
    content = {"arrays": from_params(MODEL.state_dict()), "config": ConfigRecord({"server-round": 1})}
    asked = [grid.create_message(RecordDict(dict(content)), kind, client + 1, "") for client in range(SETTINGS.clients)]
    return [reply.content["metrics"] for reply in grid.send_and_receive(asked)]


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_client_evaluates_what_it_is_sent_on_what_it_holds_out(nodes):
    data = federated_data(SETTINGS)
    for client, found in enumerate(_ask("evaluate", nodes)):
        images = data.evaluation_share(client)
        expected = score(log_probabilities(MODEL, MODEL.state_dict(), images.inputs), images.labels)
        assert found == MetricRecord(
            {"num-examples": len(images), "loss": expected.loss, "accuracy": expected.accuracy}
        )


def test_a_client_counts_the_images_that_it_trains_on():
    data = federated_data(SETTINGS)
    assert [found["num-examples"] for found in _ask("train")] == [len(data.training_share(k)) for k in range(3)]
