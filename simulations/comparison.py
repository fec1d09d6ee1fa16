"""Runs one strategy after another on the same clients and evaluates all models of every round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.incoming.records import from_params, to_params
from simulations.data import federated_data
from simulations.models import build_model
from simulations.partition_grid import PartitionGrid
from simulations.results import Round
from simulations.settings import Settings
from simulations.start import seed_sampling, start_model
from simulations.strategies import build_strategy
from simulations.training import default_device, ensemble, log_probabilities, score

Report = Callable[[Round], None]


def run_comparison(grid: Grid, settings: Settings, report: Report) -> tuple[Round, ...]:
    """All strategies of the settings, one after the other, from the same seeds and partitions.

    Parameters
    ----------
    grid : Grid
        Any nodes that run `simulations.client_app` with these settings as their run config.
    settings : Settings
        What to run.
    report : callable
        Called with every round as soon as it is evaluated.

    Raises
    ------
    C2M3Error
        When the data are missing, the settings do not fit them, or a client failed.
    """
    return tuple(each for name in settings.strategies for each in _run_strategy(grid, settings, name, report))


def _run_strategy(grid: Grid, settings: Settings, name: str, report: Report) -> list[Round]:
    data = federated_data(settings)
    model = start_model(settings)
    first, share = settings.present_in(1), settings.participation
    strategy = build_strategy(name, model, data, clients=first, participation=share)
    clients = PartitionGrid(grid, settings.present_in)
    seed_sampling(settings)
    examiner = _Examiner(clients, settings, name, report)
    result = strategy.start(clients, from_params(model.state_dict()), settings.rounds, evaluate_fn=examiner)
    if len(result.arrays) == 0:
        raise SimulationError(f"strategy {name!r} aggregated nothing")
    reported = result.train_metrics_clientapp
    return [replace(each, metrics=_numbers(reported.get(each.round))) for each in examiner.rounds]


class _Examiner:
    """Evaluates the global model and the clients' replies after every round."""

    def __init__(self, grid: PartitionGrid, settings: Settings, strategy: str, report: Report) -> None:
        self.rounds: list[Round] = []
        self._grid = grid
        self._settings = settings
        self._strategy = strategy
        self._report = report
        self._data = federated_data(settings)
        self._model = build_model(settings, self._data.shape, self._data.classes, seed=0).to(default_device())
        self._since = time.perf_counter()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Scores of a round; nothing is scored before the first."""
        if server_round == 0:
            return None
        images = self._data.held_out
        merged = score(log_probabilities(self._model, to_params(arrays), images.inputs), images.labels)
        predictions = [log_probabilities(self._model, params, images.inputs) for params in self._grid.networks]
        now = time.perf_counter()
        scored = Round(
            strategy=self._strategy,
            seed=self._settings.seed,
            round=server_round,
            accuracy=merged.accuracy,
            loss=merged.loss,
            clients=tuple(score(each, images.labels).accuracy for each in predictions),
            ensemble=score(ensemble(predictions), images.labels).accuracy,
            seconds=now - self._since,
        )
        self._since = now
        self.rounds.append(scored)
        self._report(scored)
        return MetricRecord(
            {
                "accuracy": scored.accuracy,
                "loss": scored.loss,
                "mean-client-accuracy": scored.mean_client,
                "best-client-accuracy": scored.best_client,
                "ensemble-accuracy": scored.ensemble,
            }
        )


def _numbers(record: MetricRecord | None) -> dict[str, float]:
    """The scalar metrics of a record."""
    return {} if record is None else {key: value for key, value in record.items() if isinstance(value, int | float)}
