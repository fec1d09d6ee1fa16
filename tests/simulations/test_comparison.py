from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord

from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations import client_app, comparison
from simulations.models import build_model
from simulations.partition_grid import PartitionGrid
from simulations.results import Comparison, append, load, read_lines, save
from simulations.settings import Settings

SETTINGS = Settings(hidden_widths="48,48", clients=3, rounds=2, partition="dirichlet", local_epochs=4)


def _run(settings, nodes=None, report=lambda _scored: None):
    grid = SerialGrid(client_app.app, nodes or settings.clients, run_config=settings.to_run_config())
    return comparison.run_comparison(grid, settings, report)


@pytest.fixture(scope="module")
def rounds():
    return _run(SETTINGS)


def _without_clock(rounds):
    return [
        replace(each, seconds=0.0, metrics={k: v for k, v in each.metrics.items() if "seconds" not in k})
        for each in rounds
    ]


def test_a_run_is_reproduced_to_the_last_bit_on_any_number_of_supernodes(rounds):
    assert _without_clock(_run(SETTINGS, nodes=2)) == _without_clock(rounds)


def test_every_round_of_every_strategy_is_there_in_order(rounds):
    assert [(each.strategy, each.round) for each in rounds] == [
        (name, number) for name in ("fedavg", "c2m3", "c2m3+repair") for number in (1, 2)
    ]


def test_a_strategy_that_empties_the_replies_leaves_the_clients_to_be_scored(rounds):
    (median, *_) = _run(replace(SETTINGS, strategy="fedmedian", rounds=1))
    assert median.clients == rounds[0].clients


def test_rounds_are_reported_as_they_happen(rounds):
    seen = []
    _run(replace(SETTINGS, strategy="fedavg"), report=seen.append)
    assert [(each.round, each.accuracy) for each in seen] == [(each.round, each.accuracy) for each in rounds[:2]]


def test_all_strategies_meet_the_same_clients_in_the_first_round(rounds):
    first = [each for each in rounds if each.round == 1]
    assert len({each.clients for each in first}) == len({each.ensemble for each in first}) == 1


def test_from_independent_initialisations_matching_beats_averaging(rounds):
    fedavg, c2m3, repaired = (each.accuracy for each in rounds if each.round == 1)
    assert fedavg < c2m3 < repaired


def test_the_strategys_own_numbers_are_kept(rounds):
    matched = next(each for each in rounds if each.strategy == "c2m3")
    assert matched.metrics["c2m3-objective-after"] > matched.metrics["c2m3-objective-before"]


def test_best_client_is_at_least_the_mean(rounds):
    assert all(each.best_client >= each.mean_client > 0 for each in rounds)


def _replies(settings, number):
    """State dicts that come back from a round in which a model full of zeros was sent."""
    kept = []

    class Keeper(PartitionGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            kept.extend(to_params(reply.content["arrays"]) for reply in replies)
            return replies

    model = build_model(settings, (1, 8, 8), 10, seed=0)
    zeros = from_params({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    grid = Keeper(SerialGrid(client_app.app, settings.clients, run_config=settings.to_run_config()), settings.clients)
    strategy = comparison.build_strategy("fedavg", model, comparison.federated_data(settings))
    sent = list(strategy.configure_train(number, zeros, ConfigRecord(), grid))
    list(grid.send_and_receive(sent))
    return kept


def test_only_with_independent_initialisations_is_the_first_global_model_ignored():
    # a layer of zeros stays dead under training: its outgoing gradient is zero, and so is its incoming one
    def dead(settings, number):
        return [bool((reply["1.weight"] == 0).all()) for reply in _replies(settings, number)]

    independent = replace(SETTINGS, local_epochs=1)
    shared = replace(independent, initialisation="shared")
    assert dead(independent, 1) == [False] * 3
    assert dead(independent, 2) == dead(shared, 1) == [True] * 3


def test_independent_clients_start_from_different_weights():
    one, two, three = (reply["1.weight"] for reply in _replies(replace(SETTINGS, learning_rate=1e-8), 1))
    assert not torch.allclose(one, two)
    assert not torch.allclose(two, three)


def test_a_failing_client_ends_the_comparison(monkeypatch):
    def broken(*_args, **_options):
        raise MemoryError("no more")

    monkeypatch.setattr(client_app, "train", broken)
    with pytest.raises(SimulationError, match="client 0 failed: MemoryError: no more"):
        _run(replace(SETTINGS, strategy="fedavg"))


def test_results_come_back_from_json(tmp_path, rounds):
    stored = Comparison(SETTINGS.to_run_config(), rounds)
    save(stored, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == stored
    row = json.loads((tmp_path / "results.json").read_text())["rounds"][0]
    assert row["best_client"] == max(row["clients"])


def test_progress_is_read_line_by_line_and_half_a_line_is_left_for_later(tmp_path, rounds):
    file = tmp_path / "progress.jsonl"
    assert read_lines(file) == ()
    append(rounds[:2], file)
    with file.open("a") as lines:
        lines.write('{"strategy": "c2')
    assert read_lines(file) == rounds[:2]
