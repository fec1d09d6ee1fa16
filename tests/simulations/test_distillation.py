from __future__ import annotations

import pytest
import torch

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.client_app import app
from simulations.data import federated_data
from simulations.distillation import FedDF, distil
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import train

SETTINGS = Settings(hidden_widths="16", clients=2, local_epochs=3, partition="iid")
DATA = federated_data(SETTINGS)
INPUTS = torch.cat(DATA.calibration)
MODEL = build_model(SETTINGS, (1, 8, 8), 10, seed=0)


def _trained(seed):
    model = build_model(SETTINGS, (1, 8, 8), 10, seed)
    train(model, DATA.training_share(0), SETTINGS, seed)
    return model.state_dict()


def _logits(params):
    return torch.func.functional_call(MODEL, dict(params), INPUTS)


def _divergence(student, teachers):
    wanted = torch.stack([_logits(each) for each in teachers]).mean(dim=0).softmax(dim=1)
    return float(torch.nn.functional.kl_div(_logits(student).log_softmax(dim=1), wanted, reduction="batchmean"))


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_distillation_never_moves_away_from_the_ensemble(steps):
    teachers = [_trained(1), _trained(2)]
    student = {name: (teachers[0][name] + teachers[1][name]) / 2 for name in teachers[0]}
    found = distil(MODEL, student, teachers, INPUTS, steps=steps)
    assert _divergence(found, teachers) <= _divergence(student, teachers)


def test_a_student_learns_its_teacher():
    student, teacher = _trained(1), _trained(2)
    found = distil(MODEL, student, [teacher], INPUTS, steps=300)
    assert _divergence(found, [teacher]) < 0.2 * _divergence(student, [teacher])
    assert (_logits(found).argmax(1) == _logits(teacher).argmax(1)).double().mean() > 0.95


def test_the_teacher_itself_has_nothing_to_learn():
    teacher = _trained(1)
    found = distil(MODEL, teacher, [teacher, teacher], INPUTS, steps=50)
    assert _divergence(found, [teacher]) <= max(_divergence(teacher, [teacher]), 1e-6)
    torch.testing.assert_close(_logits(found), _logits(teacher), atol=0.02, rtol=0)


def test_nothing_given_is_changed():
    student, teacher = _trained(1), _trained(2)
    before = [{name: value.clone() for name, value in each.items()} for each in (student, teacher, MODEL.state_dict())]
    distil(MODEL, student, [teacher], INPUTS, steps=20)
    for known, now in zip(before, (student, teacher, MODEL.state_dict()), strict=True):
        assert all(torch.equal(known[name], now[name]) for name in known)


def test_distillation_is_reproducible():
    one, two = (distil(MODEL, _trained(1), [_trained(2)], INPUTS, steps=20, seed=5) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def _after_a_round(steps):
    grid = SerialGrid(app, SETTINGS.clients, run_config=SETTINGS.to_run_config())
    everyone = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": 2}
    strategy = FedDF(model=MODEL, inputs=DATA.calibration, steps=steps, **everyone)
    return to_params(strategy.start(grid, from_params(MODEL.state_dict()), 1).arrays)


def test_without_a_step_it_is_fedavg_and_with_steps_it_is_not():
    from flwr.serverapp.strategy import FedAvg

    grid = SerialGrid(app, SETTINGS.clients, run_config=SETTINGS.to_run_config())
    plain = FedAvg(fraction_evaluate=0.0).start(grid, from_params(MODEL.state_dict()), 1)
    average = to_params(plain.arrays)
    still, moved = _after_a_round(0), _after_a_round(20)
    assert all(torch.equal(average[name], still[name]) for name in average)
    assert any(not torch.equal(average[name], moved[name]) for name in average)
