"""One cell of an experiment: all its methods, run as the real strategies on clients whose trainings are cached.

Strategies that only deploy a corrected model send their clients the same models, FedAvg's where nothing moves, so most
methods of a cell need the same local trainings. (From starts of their own, networks of four groups of units or more are
matched from activations as well where the server has data: methods with data then share one trajectory, methods without
another.) A training depends only on the client, the round and the model that was sent: it is done once for all methods
that need it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest, ordering_digest
from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.incoming.records import from_params, to_params
from simulations.client_app import Assignment, Trained, Trainer, build_app, train_locally
from simulations.data import FederatedData, federated_data
from simulations.flower_log import flower_log
from simulations.ledger import Measurement, finite, now, place_of
from simulations.metered_grid import MeteredGrid
from simulations.models import build_model
from simulations.partition_grid import check_answers, networks
from simulations.settings import Settings
from simulations.start import seed_sampling, start_model
from simulations.strategies import build_strategy
from simulations.training import Scores, default_device, ensemble, log_probabilities, score

_MOVED = "c2m3-share-moved"
_YOUNG = ("participation", "late-clients", "late-round")


@dataclass(eq=False)
class RememberingTrainer:
    """A trainer that caches its results.

    Attributes
    ----------
    trainer : callable
        Does the trainings that are not in the cache.
    trained : int
        Number of trainings that it did.
    """

    trainer: Trainer = train_locally
    trained: int = 0
    _known: dict[tuple[object, ...], Trained] = field(default_factory=dict)

    def __call__(self, assignment: Assignment) -> Trained:
        """The trained state dict, and the loss."""
        who = (assignment.settings, assignment.client, assignment.round, assignment.proximal)
        floating = {name: value for name, value in assignment.params.items() if value.is_floating_point()}
        key = (
            *who,
            digest(floating),
        )  # without counters of batches: they affect nothing, and strategies round them differently
        if key not in self._known:
            self._known[key] = self.trainer(assignment)
            self.trained += 1
        return self._known[key]


def key_of(settings: Settings, method: str) -> str:
    """Digest of everything that a measurement depends on, except the code.

    Settings that are younger than the first records count where they differ from their default.
    """
    usual, decided = Settings().to_run_config(), settings.to_run_config()
    young = {name for name in _YOUNG if decided[name] == usual[name]}
    decided = {name: value for name, value in decided.items() if name != "strategy" and name not in young}
    return hashlib.sha256(json.dumps([decided, method], sort_keys=True).encode()).hexdigest()[:16]


def run_cell(
    labels: dict[str, str],
    settings: Settings,
    methods: Sequence[str],
    report: Callable[[Measurement], None],
    *,
    trainer: Trainer | None = None,
    device: torch.device | None = None,
) -> None:
    """Run all methods on one federation.

    Parameters
    ----------
    labels : dict of str to str
        The cell's level on every axis.
    settings : Settings
        The federation, its seed included.
    methods : sequence of str
        Names of strategies.
    report : callable
        Called with every measurement as soon as it is made.
    trainer : callable, optional
        Trains the clients; by default a `RememberingTrainer` that all methods share.
    device : torch.device, optional
        Where clients train, C2M3 computes and models are evaluated; by default `default_device`.

    Raises
    ------
    C2M3Error
        When the data are missing, the settings do not fit them, or a client failed to train.
    """
    place = device or default_device()
    memory = RememberingTrainer(partial(train_locally, device=place)) if trainer is None else trainer
    app = build_app(memory, place)  # one for all methods: it remembers the networks that it has traced
    examiner = _Examiner(settings, place)
    with flower_log(logging.ERROR):
        for method in methods:
            before, since = getattr(memory, "trained", 0), time.perf_counter()
            found = _run_method(settings, method, app, examiner)
            report(
                Measurement(
                    cell=labels,
                    seed=settings.seed,
                    method=method,
                    accuracy=tuple(finite(each.accuracy) for each in found.scores),
                    loss=tuple(finite(each.loss) for each in found.scores),
                    calibration_error=tuple(finite(each.calibration_error) for each in found.scores),
                    clients=found.clients,
                    ensemble=found.ensemble,
                    metrics=_numbers(found.result),
                    moved=_moved(found.result),
                    trained=getattr(memory, "trained", 0) - before,
                    seconds=round(time.perf_counter() - since, 2),
                    server_seconds=round(found.server_seconds, 3),
                    down=found.down,
                    up=found.up,
                    date=now(),
                    key=key_of(settings, method),
                    place=place_of(place),
                )
            )


@dataclass(frozen=True, eq=False)
class _Found:
    result: Result
    scores: tuple[Scores, ...]
    clients: tuple[float, ...]
    ensemble: float
    server_seconds: float
    down: int
    up: int


def _run_method(settings: Settings, method: str, app: ClientApp, examiner: _Examiner) -> _Found:
    data = federated_data(settings)
    model = start_model(settings)
    first, share = settings.present_in(1), settings.participation
    strategy = build_strategy(method, model, data, clients=first, participation=share, device=examiner.device)
    last: list[Params] = []

    def keep(answers: list[Message]) -> Iterable[Message]:
        if answers and all(each.metadata.message_type == MessageType.TRAIN for each in answers):
            answers = sorted(answers, key=lambda reply: reply.metadata.src_node_id)
            check_answers(answers, grid.trained)
            last[:] = networks(answers)
            return _in_order(answers)
        return answers

    grid = MeteredGrid(app, settings, transit=keep)
    seed_sampling(settings)
    scores: list[Scores] = []
    evaluation = 0.0

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        nonlocal evaluation
        if server_round == 0:
            return None
        begin = time.process_time()
        scores.append(examiner.score(to_params(arrays)))
        evaluation += time.process_time() - begin
        return MetricRecord({"accuracy": scores[-1].accuracy, "loss": scores[-1].loss})

    since = time.process_time()
    result = strategy.start(grid, from_params(model.state_dict()), settings.rounds, evaluate_fn=evaluate)
    server = time.process_time() - since - evaluation - grid.client_seconds
    if len(scores) < settings.rounds:
        raise SimulationError(f"strategy {method!r} returned {len(scores)} models in {settings.rounds} rounds")
    alone, together = examiner.score_clients(last)
    return _Found(result, tuple(scores), alone, together, server, *grid.bytes_per_client)


def _in_order(replies: Sequence[Message]) -> list[Message]:
    """The replies in the order in which C2M3 passes them on: sums of floats, and later trainings, depend on it."""
    return sorted(replies, key=lambda reply: [ordering_digest(params) for params in networks([reply])])


class _Examiner:
    """Evaluates models on the test images, each one once."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self._data: FederatedData = federated_data(settings)
        self._model = build_model(settings, self._data.shape, self._data.classes, seed=0).to(device)
        self._known: dict[str, Tensor] = {}

    def score(self, params: Params) -> Scores:
        """Scores of one model."""
        return score(self._predict(params), self._data.held_out.labels)

    def score_clients(self, replies: Sequence[Params]) -> tuple[tuple[float, ...], float]:
        """Accuracy of every network, and of their mean probabilities."""
        labels = self._data.held_out.labels
        predictions = [self._predict(each) for each in replies]
        alone = tuple(round(score(each, labels).accuracy, 5) for each in predictions)
        return alone, round(score(ensemble(predictions), labels).accuracy, 5)

    def _predict(self, params: Params) -> Tensor:
        """Log-probabilities, shape (images, classes)."""
        name = digest(params)
        if name not in self._known:
            self._known[name] = log_probabilities(self._model, params, self._data.held_out.inputs)
        return self._known[name]


def _numbers(result: Result) -> dict[str, float | None]:
    """The strategy's scalar metrics of the last round."""
    last = result.train_metrics_clientapp.get(max(result.train_metrics_clientapp, default=0), MetricRecord())
    return {key: finite(value) for key, value in last.items() if isinstance(value, int | float)}


def _moved(result: Result) -> tuple[float, ...]:
    rounds = [result.train_metrics_clientapp[number] for number in sorted(result.train_metrics_clientapp)]
    return tuple(round(float(str(each[_MOVED])), 5) for each in rounds if _MOVED in each)
