"""What a client answers: moments of the network that it was asked about, and nothing else."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod, message_size_mod
from torch import nn

from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries import answers as answering_module
from c2m3_fl.flower.queries.moments import ACTION, answer_statistics
from c2m3_fl.flower.queries.networks import Sealed, write_networks
from c2m3_fl.flower.queries.repair import ClientStatistics, repair_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.shift import channel_moments
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, answering, mlp, normed, pooled, share

NODES = 3


def test_clients_return_moments_and_nothing_else():
    grid = SerialGrid(answering(), 1)
    content = {"arrays": from_params(mlp().state_dict()), "config": ConfigRecord({"place": -1, "before": 0})}
    message = Message(RecordDict(content), 1, f"query.{ACTION}")
    (answer,) = grid.send_and_receive([message])
    assert list(answer.content) == ["moments"]
    arrays = to_params(answer.content["moments"])
    assert {name.rsplit("/", 1)[1] for name in arrays} == {"count", "mean", "deviation"}
    assert {tuple(value.shape) for value in arrays.values()} == {(), (32,), (10,)}


@pytest.mark.parametrize("mod", [LocalDpMod(1.0, 1.0, 1.0, 1e-5), fixedclipping_mod, adaptiveclipping_mod])
def test_a_client_with_differential_privacy_gives_no_exact_answers(mod):
    name = getattr(mod, "__name__", "LocalDpMod")
    with pytest.raises(ConfigError, match=f"the client app has {name}, which bounds what its updates reveal"):
        answering(app=ClientApp(mods=[message_size_mod, mod]))
    answering(app=ClientApp(mods=[message_size_mod]))


class Switching(nn.Module):
    """Two networks of one class and the same tensors."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(64, 8), nn.Linear(8, 8), activation

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


def test_a_traced_network_does_not_serve_another_one_of_the_same_shapes(monkeypatch):
    activations, traced = iter([torch.relu, torch.tanh, torch.relu, torch.relu]), []
    monkeypatch.setattr(answering_module, "export_program", lambda *given: traced.append(1) or export_program(*given))
    app = ClientApp()
    answer_statistics(app, model=lambda context: Switching(next(activations)), data=share)
    params = Switching(torch.relu).state_dict()
    content = {"arrays": from_params(params), "config": ConfigRecord({"place": -1, "before": 0})}
    grid, counts = SerialGrid(app, 1), []
    for activation in (torch.relu, torch.tanh, torch.relu, torch.relu):
        (answer,) = grid.send_and_receive([Message(RecordDict(content), 1, f"query.{ACTION}")])
        found = to_params(answer.content["moments"])
        expected = channel_moments(Switching(activation), params, [pooled()[0]])
        for name, moments in expected.items():
            torch.testing.assert_close(found[f"{name}/mean"], moments.mean)
        counts.append(len(traced))
    shapes = counts[0]
    assert counts == [shapes, 2 * shapes, 3 * shapes, 3 * shapes], "the same network again is not traced again"


def test_a_client_measures_only_networks_that_fit_its_own():
    grid, sent = SerialGrid(answering(normed), NODES), mlp().state_dict()
    server = CalibrationSet.of(mlp(), example_inputs=EXAMPLE)
    with pytest.raises(CalibrationError):
        repair_by_clients(ClientStatistics(), Repair(), grid, [1], server, sent, [sent], [1.0])


def test_a_client_with_fewer_examples_than_it_wants_answers_none_of_the_queries():
    app, params = ClientApp(), from_params(mlp().state_dict())
    answer_statistics(app, model=lambda context: mlp(), data=share, min_examples=61)
    moments = {"arrays": params, "config": ConfigRecord({"place": -1, "before": 0})}
    asked = {"places": [1], "roles": ["fit"], "positions": 100, "holdout": 5, "seed": 0, "double": 0}
    sealed = Sealed.of(mlp().state_dict())
    networks, said = write_networks({"own": sealed, "merged": sealed}, {}, keep=False)
    sums = {**networks, "config": ConfigRecord({**asked, **said, "sketches": [0]})}
    labels = {"arrays": params, "config": ConfigRecord({"stage": "sums", "every": 5})}
    for action, content in ((ACTION, moments), ("c2m3_sums", sums), ("c2m3_labels", labels)):
        grid = SerialGrid(app, 2)
        few, enough = grid.send_and_receive([Message(RecordDict(content), node, f"query.{action}") for node in (1, 2)])
        assert "the client has 60 examples, and answers with at least 61" in few.error.reason
        assert not enough.has_error(), enough.error.reason
