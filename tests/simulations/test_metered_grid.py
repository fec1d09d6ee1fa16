from __future__ import annotations

import time

from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.records import from_params
from simulations.client_app import build_app
from simulations.metered_grid import MeteredGrid
from simulations.models import build_model
from simulations.settings import Settings

SETTINGS = Settings(hidden_widths="16", clients=2)
MODEL = build_model(SETTINGS, (1, 8, 8), 10, seed=0)
_WORK = 0.2  # seconds of CPU time of one training


def _busy(assignment):
    begin = time.process_time()
    while time.process_time() - begin < _WORK:
        pass
    return assignment.params, 0.0


def test_bytes_and_time_of_the_clients_are_counted():
    grid = MeteredGrid(build_app(_busy), SETTINGS.clients, run_config=SETTINGS.to_run_config())
    sent = from_params(MODEL.state_dict())
    strategy = FedAvg(fraction_evaluate=0.5, min_evaluate_nodes=1)
    strategy.start(grid, sent, 2)
    model = sum(len(array.data) for array in sent.values())
    down, up = grid.bytes_per_client
    assert up == 2 * model  # two trainings; evaluations answer without arrays
    assert down == 3 * model  # two trainings and, on average, one evaluation
    assert 4 * _WORK <= grid.client_seconds < 4 * _WORK + 2
