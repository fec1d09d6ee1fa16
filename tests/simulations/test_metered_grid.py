from __future__ import annotations

import time

from flwr.serverapp.strategy import FedAvg

from c2m3_fl.core.state_dicts import digest
from c2m3_fl.flower.incoming.records import from_params
from simulations.client_app import build_app
from simulations.metered_grid import MeteredGrid
from simulations.models import build_model
from simulations.settings import Settings
from simulations.trial import run_cell

SETTINGS = Settings(hidden_widths="16", clients=2)
MODEL = build_model(SETTINGS, (1, 8, 8), 10, seed=0)
_WORK = 0.2  # seconds of CPU time of one training


def _busy(assignment):
    begin = time.process_time()
    while time.process_time() - begin < _WORK:
        pass
    return assignment.params, 0.0


def test_bytes_and_time_of_the_clients_are_counted():
    grid = MeteredGrid(build_app(_busy), SETTINGS)
    sent = from_params(MODEL.state_dict())
    strategy = FedAvg(fraction_evaluate=0.5, min_evaluate_nodes=1)
    begin = time.process_time()
    strategy.start(grid, sent, 2)
    whole = time.process_time() - begin
    model = sum(len(array.data) for array in sent.values())
    down, up = grid.bytes_per_client
    assert up == 2 * model  # two trainings; evaluations answer without arrays
    assert down == 3 * model  # two trainings and, on average, one evaluation
    assert 4 * _WORK <= grid.client_seconds < whole


def test_late_clients_join_in_their_round_with_a_network_of_their_own():
    settings = Settings(hidden_widths="16", clients=4, late_clients=2, late_round=2, initialisation="shared")
    started = []

    def watch(assignment):
        started.append((assignment.round, assignment.client, digest(assignment.params)))
        return assignment.params, 0.0

    grid = MeteredGrid(build_app(watch), settings)
    everyone = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": 2}
    FedAvg(**everyone).start(grid, from_params(MODEL.state_dict()), 3)
    assert [(number, client) for number, client, _ in sorted(started)] == [
        *((1, client) for client in (0, 1)),
        *((number, client) for number in (2, 3) for client in range(4)),
    ]
    starts = {(number, client): start for number, client, start in started}
    assert starts[1, 0] == starts[1, 1] == starts[2, 0] == starts[2, 1]
    assert len({starts[2, 0], starts[2, 2], starts[2, 3]}) == 3
    assert len({starts[3, client] for client in range(4)}) == 1


def test_a_share_of_the_clients_trains_and_every_method_samples_the_same():
    settings = Settings(hidden_widths="16", clients=6, participation=0.5, rounds=3, initialisation="shared")
    sampled = {}
    for method in ("fedavg", "c2m3+default"):
        seen = sampled.setdefault(method, [])

        def watch(assignment, seen=seen):
            seen.append((assignment.round, assignment.client))
            return assignment.params, 0.0

        run_cell({"cell": "one"}, settings, [method], lambda _: None, trainer=watch)
    assert len(sampled["fedavg"]) == 9
    assert sorted(sampled["fedavg"]) == sorted(sampled["c2m3+default"])
    assert len({client for _, client in sampled["fedavg"]}) > 3
