from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from c2m3_fl.errors import C2M3Error, SimulationError
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations import client_app
from simulations.client_app import train_locally
from simulations.comparison import run_comparison
from simulations.settings import Settings
from simulations.trial import RememberingTrainer, key_of, run_cell

SETTINGS = Settings(
    hidden_widths="16,16", clients=3, rounds=3, local_epochs=1, partition="dirichlet", initialisation="shared"
)
EVERY_TRAINING = SETTINGS.clients * SETTINGS.rounds


def _run(settings, methods, trainer=None):
    found = []
    run_cell({"cell": "one"}, settings, methods, found.append, trainer=trainer)
    return found


def _numbers(measurement):
    return (measurement.method, measurement.accuracy, measurement.loss, measurement.clients, measurement.ensemble)


def test_methods_with_one_trajectory_train_once():
    first, second = _run(SETTINGS, ["fedavg", "c2m3"])
    assert second.moved == (0.0, 0.0, 0.0)  # nothing to align, so C2M3 sends what FedAvg sends
    assert (first.trained, second.trained) == (EVERY_TRAINING, 0)
    assert first.accuracy == second.accuracy


def test_methods_that_only_deploy_send_what_c2m3_sends_where_everything_moves():
    methods = [
        "c2m3",
        "c2m3+batchnorm",
        "c2m3+repair",
        "c2m3+refit",
        "c2m3+head",
        "c2m3+client-refit",
        "c2m3+repair-moved",
    ]
    first, *deploying, moved = _run(replace(SETTINGS, initialisation="independent"), methods)
    assert first.moved[0] > 0.5
    assert {each.method: each.trained for each in deploying} == dict.fromkeys(methods[1:-1], 0)
    assert moved.trained == EVERY_TRAINING - SETTINGS.clients  # REPAIR of the first round is trained on


def test_in_deep_networks_data_on_the_server_begin_a_second_trajectory_that_all_methods_with_them_share():
    """From four groups of units on, calibration data let the match start from activations, too."""
    deep = replace(SETTINGS, initialisation="independent", hidden_widths="16,16,16,16", rounds=2)
    without, data = ["c2m3", "c2m3+head", "c2m3+client-refit"], ["c2m3+batchnorm", "c2m3+repair", "c2m3+refit"]
    found = {each.method: each for each in _run(deep, [*without, *data])}
    second = deep.clients  # trainings of the second round; those of the first are from the clients' own starts
    assert [found[method].trained for method in without] == [2 * second, 0, 0]
    assert [found[method].trained for method in data] == [second, 0, 0]
    assert len({found[method].moved for method in without}) == len({found[method].moved for method in data}) == 1


def test_methods_that_send_other_models_train_for_themselves():
    first, second = _run(SETTINGS, ["fedavg", "fedadam"])
    assert first.trained == EVERY_TRAINING
    assert second.trained == EVERY_TRAINING - SETTINGS.clients  # the first round starts from the same model


def test_a_pull_towards_the_model_sent_is_another_training():
    _, second = _run(SETTINGS, ["fedavg", "fedprox"])
    assert second.trained == EVERY_TRAINING


@pytest.mark.slow
@pytest.mark.parametrize("start", ["shared", "independent"])
def test_remembered_trainings_change_no_result(start):
    settings = replace(SETTINGS, initialisation=start)
    methods = ["fedavg", "c2m3", "c2m3+repair", "fedprox"]
    with_memory = _run(settings, methods)
    without = _run(settings, methods, trainer=train_locally)
    assert [_numbers(each) for each in with_memory] == [_numbers(each) for each in without]


@pytest.mark.parametrize("start", ["shared", "independent"])
def test_compare_and_experiment_measure_the_same_of_one_federation(start):
    settings = replace(SETTINGS, initialisation=start, strategy="c2m3+repair")
    grid = SerialGrid(client_app.app, settings.clients, run_config=settings.to_run_config())
    rounds = run_comparison(grid, settings, lambda _scored: None)
    (measured,) = _run(settings, ["c2m3+repair"])
    assert [each.accuracy for each in rounds] == pytest.approx(measured.accuracy, abs=1e-4)
    assert [each.loss for each in rounds] == pytest.approx(measured.loss, rel=1e-4)
    assert rounds[-1].clients == pytest.approx(measured.clients, abs=1e-4)
    assert rounds[-1].ensemble == pytest.approx(measured.ensemble, abs=1e-4)


def test_what_is_remembered_is_not_changed_by_who_gets_it():
    memory, seen = RememberingTrainer(), []

    def watching(assignment):
        params, loss = memory(assignment)
        seen.append((params, {name: value.clone() for name, value in params.items()}))
        return params, loss

    _run(SETTINGS, ["fedavg", "c2m3+repair", "feddf"], trainer=watching)
    assert all(torch.equal(now[name], then[name]) for now, then in seen for name in now)


def test_every_round_is_scored_and_the_last_rounds_clients():
    (found,) = _run(SETTINGS, ["fedavg"])
    assert len(found.accuracy) == len(found.loss) == 3
    assert len(found.clients) == 3
    assert 0 <= min(found.clients) <= max(found.clients) <= 1


def test_a_key_tells_settings_and_methods_apart_but_not_the_list_of_strategies():
    keys = {key_of(SETTINGS, "fedavg"), key_of(replace(SETTINGS, seed=1), "fedavg"), key_of(SETTINGS, "c2m3")}
    assert len(keys) == 3
    assert key_of(replace(SETTINGS, strategy="fedmedian"), "fedavg") == key_of(SETTINGS, "fedavg")


def test_a_failing_client_ends_the_cell(monkeypatch):
    def broken(*_args, **_options):
        raise MemoryError("no more")

    monkeypatch.setattr(client_app, "train", broken)
    with pytest.raises(SimulationError, match="client 0 failed: MemoryError: no more"):
        _run(SETTINGS, ["fedavg"])


def test_flowers_log_has_its_level_back_after_a_cell():
    before = logging.getLogger("flwr").level
    _run(replace(SETTINGS, rounds=1), ["fedavg"])
    assert logging.getLogger("flwr").level == before


@pytest.mark.parametrize("method", ["c2m3+default", "c2m3+client-refit+head", "mergemany+head"])
def test_nothing_is_computed_off_the_device_that_was_asked_for(monkeypatch, method):
    """Where CUDA looks available and is not, every step on the default device fails."""
    settings = replace(SETTINGS, rounds=1, initialisation="independent")
    expected, found = _run(settings, [method]), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run_cell({"cell": "one"}, settings, [method], found.append, device=torch.device("cpu"))
    assert [_numbers(each) for each in found] == [_numbers(each) for each in expected]
    with pytest.raises((AssertionError, C2M3Error, RuntimeError), match=r"CUDA|NVIDIA"):
        _run(settings, [method])
