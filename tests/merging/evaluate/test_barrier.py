from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import floating
from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError
from c2m3_fl.merging.evaluate.barrier import barrier, pairwise_barriers, simplex
from c2m3_fl.merging.evaluate.landscape import landscape
from c2m3_fl.merging.evaluate.scoring import evaluate
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics
from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.network.calibration import load_batches
from tests.merging.networks import CALIBRATION, nodes, outputs

LABELS = [torch.randint(5, (len(batch),), generator=torch.Generator().manual_seed(5)) for batch in CALIBRATION]
DATA = list(zip(CALIBRATION, LABELS, strict=True))


def test_the_ends_of_a_segment_are_the_networks() -> None:
    model, (one, two) = nodes("mlp", 2)
    found = barrier(model, one, two, DATA, points=3)
    inputs, labels = torch.cat(CALIBRATION), torch.cat(LABELS)
    for params, score in ((one, found.scores[0]), (two, found.scores[-1])):
        logits = outputs(model, params, inputs)
        assert score.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)
        assert score.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_barriers_are_never_negative_and_vanish_between_equal_networks() -> None:
    model, (one, two) = nodes("mlp", 2)
    found = barrier(model, one, two, DATA)
    assert found.loss_barrier >= 0
    assert found.accuracy_barrier >= 0
    same = barrier(model, one, one, DATA)
    assert same.loss_barrier == pytest.approx(0, abs=1e-12)
    assert same.accuracy_barrier == pytest.approx(0, abs=1e-12)


def test_the_loss_of_a_linear_model_is_convex_so_it_has_no_barrier() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    params = [{"1.weight": torch.randn(5, 192), "1.bias": torch.randn(5)} for _ in range(3)]
    assert barrier(model, params[0], params[1], DATA).loss_barrier == pytest.approx(0, abs=1e-6)
    assert simplex(model, params, DATA, samples=20).loss_barrier == pytest.approx(0, abs=1e-6)


def test_every_pair_has_a_segment() -> None:
    model, params = nodes("mlp", 3)
    assert set(pairwise_barriers(model, params, DATA, points=2)) == set(combinations(range(3), 2))


def test_a_simplex_of_two_networks_is_their_segment() -> None:
    model, params = nodes("mlp", 2)
    line = barrier(model, *params, DATA, points=3)
    corners = simplex(model, params, DATA)
    assert corners.scores == (line.scores[0], line.scores[2], line.scores[1])
    assert corners.loss_barrier == pytest.approx(line.loss_barrier)


def test_points_of_a_simplex_are_weights() -> None:
    model, params = nodes("mlp", 3)
    found = simplex(model, params, DATA, samples=5)
    assert len(found.weights) == 3 + 1 + 5
    assert all(sum(each) == pytest.approx(1) and min(each) >= 0 for each in found.weights)


@pytest.mark.parametrize("network", ["mlp", "batch norm"])
def test_a_landscape_holds_the_networks_at_their_corners(network: str) -> None:
    model, params = nodes(network, 3)
    found = landscape(model, params, DATA, resolution=2, margin=0.0)
    ends = barrier(model, params[0], params[1], DATA, points=2)
    distances = [
        float(sum((params[0][n] - other[n]).double().square().sum() for n in floating(other))) for other in params
    ]
    for (x, y), squared in zip(found.corners, distances, strict=True):
        assert x**2 + y**2 == pytest.approx(squared, rel=1e-6)
    column = min(range(len(found.x)), key=lambda index: abs(found.x[index]))
    assert found.y[0] == 0
    if found.x[column] == 0:
        assert float(found.loss[0, column]) == pytest.approx(ends.scores[0].loss, rel=1e-5)


def test_what_cannot_be_drawn_is_refused() -> None:
    model, (one, two, _) = nodes("mlp", 3)
    with pytest.raises(ConfigError, match="three networks, got 2"):
        landscape(model, [one, two], DATA)
    with pytest.raises(ConfigError, match="on one line"):
        landscape(model, [one, two, one], DATA)
    with pytest.raises(ConfigError, match="points is 1"):
        barrier(model, one, two, DATA, points=1)
    with pytest.raises(ConfigError, match="at least two networks, got 1"):
        simplex(model, [one], DATA)
    with pytest.raises(ConfigError, match="samples is -1"):
        simplex(model, [one, two], DATA, samples=-1)
    with pytest.raises(ConfigError, match="resolution is 1"):
        landscape(model, [one, two, one], DATA, resolution=1)
    with pytest.raises(CalibrationError, match="labelled"):
        barrier(model, one, two, CALIBRATION)
    with pytest.raises(ParamsError, match="node 1: keys differ"):
        barrier(model, one, {}, DATA)


def test_between_networks_batch_norm_is_estimated_again_and_the_networks_stay_as_they_are() -> None:
    model, (one, two) = nodes("batch norm", 2)
    again, kept = (barrier(model, one, two, DATA, points=3, renormalise=each) for each in (None, False))
    assert (again.scores[0], again.scores[2]) == (kept.scores[0], kept.scores[2])
    half = BatchNormStatistics()(prepare(model, weighted_mean([one, two]), [one, two], CALIBRATION)).state_dict
    wanted = evaluate(model, half, load_batches(DATA))
    assert again.scores[1].loss == pytest.approx(wanted.loss, rel=1e-5)
    assert again.scores[1] != kept.scores[1]
    centre = simplex(model, [one, two], DATA).scores[2]
    assert centre.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_without_batch_norm_there_is_nothing_to_estimate_again() -> None:
    model, (one, two) = nodes("mlp", 2)
    assert barrier(model, one, two, DATA) == barrier(model, one, two, DATA, renormalise=False)
    with pytest.raises(ConfigError, match="no running statistics"):
        barrier(model, one, two, DATA, renormalise=True)


def test_tied_weights_may_be_two_tensors_as_they_are_in_a_file() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    inputs, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    batches = load_batches([(inputs, labels)], model=model)
    read = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(model, read, batches) == evaluate(model, model.state_dict(), batches)
