"""The weights that adapters add to are found in the network's modules, and proven on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.lora_base import Base, find_bases
from c2m3_fl.network.calibration import as_batch


class Adapted(nn.Module):
    """A layer and an adapter whose product is scaled, and transposed where the base is."""

    def __init__(self, rows, columns, *, told=0.5, scale=0.5, turned=False):
        super().__init__()
        self.base_layer = nn.Linear(columns, rows)
        if turned:
            self.base_layer.weight.data = torch.randn(columns, rows)
            self.fan_in_fan_out = True
        self.lora_A = nn.ParameterDict({"default": torch.zeros(2, columns)})
        self.lora_B = nn.ParameterDict({"default": torch.zeros(rows, 2)})
        self.scaling, self.scale, self.turned = {"default": told}, scale, turned

    def forward(self, x):
        weight = self.base_layer.weight.T if self.turned else self.base_layer.weight
        product = self.lora_B["default"] @ self.lora_A["default"]
        return nn.functional.linear(x, weight + self.scale * product, self.base_layer.bias)


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(Adapted(6, 4, **options), nn.ReLU(), Adapted(6, 6, **options))


def found(model):
    return find_bases(model, as_batch(torch.zeros(2, 4)))


@pytest.mark.parametrize("turned", [False, True])
def test_the_base_its_scale_and_its_layout_are_found(turned):
    """The example is all zeros: it shows the shapes, and the proof draws its own inputs."""
    names = ("0.base_layer.weight", "2.base_layer.weight")
    downs = ("0.lora_A.default", "2.lora_A.default")
    assert found(network(turned=turned)) == {d: Base(n, 0.5, turned) for d, n in zip(downs, names, strict=True)}


def test_a_scale_that_is_not_the_network_s_is_refused():
    with pytest.raises(
        ConfigError, match=r"adding scaling \* B A to \['0.base_layer.weight'.* is not what the adapters"
    ):
        found(network(told=1.0))


def test_a_base_that_is_not_there_or_not_alone_is_refused():
    model = network()
    model[0].base_layer.weight = None
    model[0].register_buffer("hidden", torch.zeros(24))
    with pytest.raises(ConfigError, match=r"the base of '0.lora_A.default' is not found: in '0', no weights have"):
        found(model)
    model = network()
    model[2].other = nn.Parameter(torch.zeros(6, 6))
    with pytest.raises(ConfigError, match=r"\['2.base_layer.weight', '2.other'\]|\['2.other', '2.base_layer.weight'\]"):
        found(model)
    with pytest.raises(ConfigError, match="there are no adapters"):
        find_bases(nn.Linear(4, 2), as_batch(torch.zeros(2, 4)))
