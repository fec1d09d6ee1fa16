from __future__ import annotations

import pytest
import torch

from c2m3_fl import permutation_spec
from c2m3_fl.errors import ConfigError
from simulations.models import build_model
from simulations.settings import Settings

MODELS = {  # name: number of permutation groups that a reader of the network would count
    "mlp": 2,
    "cnn": 3,
    "conv3": 3,
    "cnn-pooled": 4,
    "lenet": 4,
    "vgg11": 8,
    "vgg11-bn": 8,
    "vgg16": 13,
    "vgg16-bn": 13,
    "resnet8-bn": 6,
    "resnet20-bn": 12,  # one per block, and one residual stream per stage
    "resnet20-ln": 12,
    "vit": 17,  # the stream; per block heads, channels within them (query and value), the MLP
}


def _settings(name: str) -> Settings:
    return Settings(model=name, width=0.25, hidden_widths="16,8")


@pytest.mark.parametrize("name", MODELS)
def test_a_network_maps_images_to_logits(name):
    model = build_model(_settings(name), (3, 32, 32), 7, seed=0)
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_of_a_network_are_those_a_reader_counts(name):
    spec = permutation_spec(build_model(_settings(name), (1, 32, 32), 10, seed=0), torch.rand(2, 1, 32, 32))
    assert len(spec.groups) == MODELS[name]


def test_the_seed_decides_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    one, same, other = (build_model(_settings("cnn"), (1, 8, 8), 10, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "smallest"), [("vgg16", 32), ("lenet", 16), ("cnn", 8)])
def test_images_too_small_for_a_network_are_refused(name, smallest):
    build_model(_settings(name), (1, smallest, smallest), 10, seed=0)
    side = smallest - 1
    with pytest.raises(ConfigError, match=f"'{name}' needs images of at least {smallest}x{smallest}.*{side}x{side}"):
        build_model(_settings(name), (1, side, side), 10, seed=0)
