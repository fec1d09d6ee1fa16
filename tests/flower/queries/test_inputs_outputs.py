"""Clients whose batches are dicts, and whose network returns more than class scores."""

from __future__ import annotations

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.queries import answers as answering_module
from c2m3_fl.flower.queries.moments import answer_statistics
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, answering, digits_app, mlp, same, share

NODES = 3


class Telling(nn.Sequential):
    """The MLP of the tests; it returns its hidden layer, too."""

    def forward(self, pixels):
        *layers, last = self
        for layer in layers:
            pixels = layer(pixels)
        return {"hidden": pixels, "scores": last(pixels)}


def telling():
    return Telling(*mlp())


def batches(context):
    return [{"id": torch.arange(len(data)), "img": data, "label": labels} for data, labels in share(context)]


def clients(**options):
    app = digits_app(epochs=1, rate=0.02, evaluates="loss")
    answer_statistics(app, model=lambda context: telling(), data=batches, first_layer=True, **options)
    return app


def played(app, model, **options):
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=model, example_inputs=EXAMPLE, **options)
    return strategy.start(SerialGrid(app, NODES), from_params(mlp().state_dict()), num_rounds=1)


ASKED = {
    "head": {"head": "labels"},
    "refit": {"recalibrate": ClientRefit(), "head": None, "judge": None},
    "moments": {"recalibrate": "repair", "calibration": ClientStatistics(), "head": None},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED.keys())
def test_dict_batches_and_chosen_outputs_give_what_tuples_and_scores_alone_give(options):
    usual = answering(app=digits_app(epochs=1, rate=0.02, evaluates="loss"), first_layer=True)
    expected = played(usual, mlp(), **options)
    found = played(clients(inputs=("img",), outputs="scores"), telling(), outputs="scores", **options)
    assert found.train_metrics_clientapp[1]["c2m3-repaired"] == 1
    assert same(found.arrays, expected.arrays)


def test_without_inputs_the_clients_say_which_keys_there_are(caplog):
    played(clients(outputs="scores"), telling(), outputs="scores", head="labels")
    assert any("'id', 'img'" in text and "inputs=(" in text for text in caplog.messages)


def test_a_network_with_chosen_outputs_is_traced_once(monkeypatch, request):
    traced = []
    request.getfixturevalue("_programs").clear()  # of this file's other tests
    monkeypatch.setattr(answering_module, "export_program", lambda *given: traced.append(1) or export_program(*given))
    options = {"outputs": "scores", "recalibrate": ClientRefit(), "head": "labels"}
    played(clients(inputs=("img",), outputs="scores"), telling(), **options)
    kinds = {len(data) for partition in range(NODES) for data in torch.arange(60 + 20 * partition).split(32)}
    assert len(traced) == len(kinds)
