from __future__ import annotations

import math

import pytest
import torch

from simulations.data import Images, federated_data
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import ensemble, log_probabilities, score, train

SETTINGS = Settings(hidden_widths="16", local_epochs=3)


def _model(seed: int = 0) -> torch.nn.Module:
    return build_model(SETTINGS, (1, 8, 8), 10, seed)


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_training_lowers_the_loss(optimiser):
    settings = Settings(hidden_widths="16", local_epochs=3, optimiser=optimiser, learning_rate=0.01)
    model, images = _model(), federated_data(SETTINGS).held_out
    before = score(log_probabilities(model, model.state_dict(), images.inputs), images.labels).loss
    assert train(model, images, settings, seed=0) < before


def test_batches_of_one_are_trained_on_where_they_are_asked_for():
    model, images = _model(), federated_data(SETTINGS).held_out
    before = score(log_probabilities(model, model.state_dict(), images.inputs), images.labels).loss
    settings = Settings(hidden_widths="16", local_epochs=1, batch_size=1, learning_rate=0.001)
    assert 0 < train(model, images, settings, seed=0) < before


def test_training_is_reproducible():
    images = federated_data(SETTINGS).held_out
    models = [_model(), _model()]
    for model in models:
        train(model, images, SETTINGS, seed=4)
    assert all(torch.equal(one, two) for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_batch_of_one_is_left_to_no_batch_norm():
    settings = Settings(model="resnet20-bn", width=0.125, batch_size=8, local_epochs=1)
    model = build_model(settings, (1, 8, 8), 10, seed=0)
    assert math.isfinite(train(model, Images(torch.rand(9, 1, 8, 8), torch.arange(9)), settings, seed=0))


def test_the_proximal_term_has_the_gradient_of_half_the_squared_distance():
    # one batch of plain SGD per epoch: the second step starts away from the start, where the term pulls
    settings = Settings(hidden_widths="16", local_epochs=2, momentum=0.0, batch_size=500, learning_rate=0.1)
    images, proximal = federated_data(SETTINGS).held_out, 0.7
    pulled, expected = _model(), _model()
    train(pulled, images, settings, seed=0, proximal=proximal)

    start = [value.detach().clone() for value in expected.parameters()]
    optimiser = torch.optim.SGD(expected.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        distance = sum(
            ((value - before) ** 2).sum() for value, before in zip(expected.parameters(), start, strict=True)
        )
        loss = torch.nn.functional.cross_entropy(expected(images.inputs), images.labels)
        (loss + proximal / 2 * distance).backward()
        optimiser.step()
    for one, two in zip(pulled.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_score_counts_hits_and_averages_the_surprise():
    predicted = torch.log(torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]]))
    result = score(predicted, torch.tensor([0, 1, 1, 1]))
    assert result.accuracy == 0.75
    assert result.loss == pytest.approx(-(math.log(0.7) + math.log(0.6) + math.log(0.1) + math.log(0.8)) / 4)
    confident = [0.7 - 1, 0.6 - 1, 0.9 - 0, 0.8 - 1]  # confidence minus hit, each in a bin of its own
    assert result.calibration_error == pytest.approx(sum(map(abs, confident)) / 4)


def test_an_ensemble_averages_probabilities():
    models = torch.rand(3, 5, 4).softmax(dim=-1)
    torch.testing.assert_close(ensemble(models.log()).exp(), models.mean(dim=0))
