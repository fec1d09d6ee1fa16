from __future__ import annotations

import numpy as np
import pytest
import torch

from c2m3_fl.errors import ConfigError
from simulations.data import derived_seed, federated_data
from simulations.settings import Settings


def test_clients_and_calibration_share_no_image():
    data = federated_data(Settings(calibration_size=150, clients=4))
    rows = np.concatenate([data.calibration_rows, *data.parts])
    assert len(data.calibration_rows) == 150
    assert len(np.unique(rows)) == len(rows) == len(data.train.labels)


def test_calibration_has_no_labels_and_all_its_images():
    data = federated_data(Settings(calibration_size=300))
    assert all(isinstance(batch, torch.Tensor) for batch in data.calibration)
    assert sum(len(batch) for batch in data.calibration) == 300


def test_sizes_are_those_asked_for():
    data = federated_data(Settings(train_size=500, test_size=60, image_size=16))
    assert sum(len(part) for part in data.parts) == 500
    assert data.held_out.inputs.shape == (60, 1, 16, 16)
    assert data.shape == (1, 16, 16)


def test_what_a_client_holds_out_it_does_not_train_on():
    whole, split = federated_data(Settings(clients=2)), federated_data(Settings(clients=2, holdout=0.2))
    for client in range(2):
        parts = [split.training_share(client), split.evaluation_share(client)]
        assert len(parts[1]) == round(0.2 * len(whole.parts[client]))
        joined = torch.cat([part.inputs for part in parts])
        assert torch.equal(joined, whole.training_share(client).inputs)


def test_a_client_that_holds_nothing_out_evaluates_on_all_its_images():
    data = federated_data(Settings(clients=2))
    assert torch.equal(data.training_share(1).inputs, data.evaluation_share(1).inputs)


def test_pixels_are_standardised():
    data = federated_data(Settings(clients=2))
    pixels = torch.cat([data.training_share(client).inputs for client in range(2)])
    assert abs(float(pixels.mean())) < 0.02
    assert abs(float(pixels.std()) - 1) < 0.02


def test_another_seed_gives_other_shares_but_the_same_test_images():
    one, two = federated_data(Settings(seed=1)), federated_data(Settings(seed=2))
    assert not np.array_equal(one.calibration_rows, two.calibration_rows)
    assert torch.equal(one.held_out.inputs, two.held_out.inputs)


def test_more_images_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="train-size 1400 and calibration-size 200 exceed the 1437 training images"):
        federated_data(Settings(train_size=1400))


def test_derived_seeds_differ_by_path():
    seeds = {derived_seed(seed, *path) for seed in range(3) for path in [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]}
    assert len(seeds) == 18
