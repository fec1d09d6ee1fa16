from __future__ import annotations

import pytest
import torch

from c2m3_fl import merge, permutation_spec
from c2m3_fl.core import permutation
from c2m3_fl.errors import ConfigError
from simulations.data import Images
from simulations.models import build_model
from simulations.settings import Settings
from simulations.text import ALPHABET
from simulations.training import train

LENGTH = 6


def _network(name, seed=0):
    return build_model(Settings(model=name, width=0.0625), (LENGTH,), len(ALPHABET), seed)


def _windows(count, seed=0):
    return torch.randint(len(ALPHABET), (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["lstm", "gpt"])
def test_a_state_sees_no_later_character(name):
    model, tokens = _network(name).eval(), _windows(3)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % len(ALPHABET)
    before, after = model.states(tokens), model.states(other)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("name", ["lstm", "gpt"])
def test_the_loss_is_the_mean_over_prefixes_of_their_next_characters(name):
    model, tokens, following = _network(name).eval(), _windows(3), torch.tensor([1, 2, 3])
    everything = torch.cat([tokens, following[:, None]], dim=1)
    each = [
        torch.nn.functional.cross_entropy(model(everything[:, :end]), everything[:, end])
        for end in range(1, LENGTH + 1)
    ]
    torch.testing.assert_close(model.loss(tokens, following), torch.stack(each).mean())


@pytest.mark.parametrize("name", ["lstm", "gpt"])
def test_a_language_model_learns_from_every_character_of_a_window(name):
    tokens = torch.arange(64)[:, None].add(torch.arange(LENGTH)) % 10
    settings = Settings(local_epochs=20, optimiser="adam", learning_rate=0.03, batch_size=16)
    model, images = _network(name), Images(tokens, (tokens[:, -1] + 1) % 10)
    assert train(model, images, settings, seed=0) < 0.5  # it begins above 4


GROUPS = {
    "lstm": [8, 16, 16],  # the embedding, and the states of both layers
    "gpt": [8, *[4, 8, 8, 32] * 4],  # the stream; per block heads, channels within them (query and value), the MLP
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_are_those_a_reader_counts_and_a_copy_in_another_order_merges_to_itself(name):
    model, tokens = _network(name).eval(), _windows(4)
    spec = permutation_spec(model, tokens)
    assert sorted(group.size for group in spec.groups.values()) == sorted(GROUPS[name])
    node = model.state_dict()
    twin = permutation.apply(spec, permutation.random(spec, torch.Generator().manual_seed(0)), node)
    assert not torch.equal(twin["head.weight"], node["head.weight"])
    merged = merge(model, [node, twin], spec=spec, example_inputs=tokens).state_dict
    torch.testing.assert_close(torch.func.functional_call(model, merged, tokens), model(tokens))


@pytest.mark.parametrize(
    ("shape", "model", "said"), [((6,), "mlp", "text: set model to one of lstm, gpt"), ((1, 8, 8), "gpt", "images")]
)
def test_networks_and_data_of_different_kinds_are_refused(shape, model, said):
    with pytest.raises(ConfigError, match=said):
        build_model(Settings(model=model), shape, 10, seed=0)
