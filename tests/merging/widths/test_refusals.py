"""What merges of different widths refuse, and what they say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from c2m3_fl.errors import C2M3Error, CalibrationError, ConfigError, ParamsError, SpecError
from c2m3_fl.merging.align.cca import CCA
from c2m3_fl.merging.align.methods import ActivationMatching
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.repair import Repair
from tests.merging.networks import CALIBRATION
from tests.merging.widths.networks import Tied, WideAttention, mlp

FEW = CALIBRATION[:1]


def refused(error: type[C2M3Error], words: str, models: Any, **options: Any) -> None:
    options.setdefault("state_dicts", [model.state_dict() for model in models])
    options = {"example_inputs": FEW[0], **options}
    with pytest.raises(error, match=re.escape(words)):
        merge(models=models, **options)


def test_networks_that_differ_in_more_than_width_are_refused_by_the_place_where_they_differ() -> None:
    first = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 5))
    deeper = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))
    refused(
        SpecError, "models[1] differs from models[0] in more than its width: it has the tensor '5.", [first, deeper]
    )
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 5))
    refused(SpecError, "aten.tanh.default in '2', there aten.relu.default in '2'", [first, other])
    same = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 5))
    refused(SpecError, "aten.tanh.default in '2', there aten.relu.default in '2'", [first, same])
    classes = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 7))
    refused(
        SpecError, "'3.weight' axis 0 has 7 coordinates that may not be permuted (network output)", [first, classes]
    )
    alone = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.ReLU(), nn.Linear(1, 5))
    refused(SpecError, "'1.weight' axis 0 carries no units", [first, alone])


def test_a_scale_that_depends_on_the_width_is_refused_by_its_operator() -> None:
    words = "aten.scaled_dot_product_attention.default in 'attention' has the constants ['heads of 4 units']"
    refused(SpecError, words, [WideAttention(2, 8), WideAttention(2, 4)])

    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner, self.outer, self.scale = nn.Linear(192, width), nn.Linear(width, 5), width**-0.5

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.outer(torch.relu(self.inner(images.flatten(1)) * self.scale)))

    refused(SpecError, "aten.mul.Tensor in '' has the constants [0.5], there [0.25]", [Scaled(16), Scaled(4)])


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_depends_on_the_width_is_refused_by_name(persistent: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(192, width), nn.Linear(width, 5)
            self.register_buffer("scale", torch.tensor(width**-0.5), persistent=persistent)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.outer(torch.relu(self.inner(images.flatten(1)) * self.scale)))

    refused(SpecError, "the buffer 'scale' is 0.5 in models[1], in models[0] 0.25", [Scaled(16), Scaled(4)])


def test_a_tensor_that_both_makes_and_reads_missing_units_is_refused_by_name() -> None:
    tokens = torch.arange(6).reshape(3, 2)
    refused(SpecError, "'embedding.weight' both produces and reads units", [Tied(8), Tied(4)], example_inputs=tokens)


def test_if_no_network_has_room_for_all_others_a_wider_one_must_be_named() -> None:
    def network(first: int, second: int) -> nn.Module:
        layers = (nn.Linear(192, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 5))
        return nn.Sequential(nn.Flatten(), *layers)

    models = [network(8, 4), network(4, 8)]
    refused(SpecError, "the largest is models[0] in group '1', models[1] in group '3'); pass a wider one", models)
    nodes = [model.state_dict() for model in models]
    merged = merge(models=models, state_dicts=nodes, width=network(8, 8), example_inputs=FEW[0])
    assert merged.state_dict["3.weight"].shape == (8, 8)


@pytest.mark.parametrize("width", [2, -1, True, "widest", 0.5])
def test_a_width_that_names_no_network_is_refused(width: object) -> None:
    refused(ConfigError, f"width is {width!r}, expected a number in models (0 to 1)", [mlp(1), mlp(2)], width=width)


@pytest.mark.parametrize("method", [CCA(), ActivationMatching(), ActivationMatching(universe=True), "c2m3"])
def test_methods_that_compare_activations_are_refused(method: object) -> None:
    options = {"method": method, "start": "activations"} if method == "c2m3" else {"method": method}
    refused(ConfigError, "compares activations of networks of one width", [mlp(1), mlp(2)], **options)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    models = [mlp(1), mlp(2)]
    nodes = [model.state_dict() for model in models]
    refused(ConfigError, "models: got 2, expected one for each of the 1 nodes", models, state_dicts=nodes[:1])
    refused(ConfigError, "model and models are both given", models, model=models[0])
    refused(
        ConfigError,
        "spec, moments and rotations are for nodes of one width",
        models,
        moments=[{}, {}],
        recalibrate="auto",
    )
    refused(
        ConfigError,
        "closed_form=True) takes endpoints of one width",
        models,
        calibration=FEW,
        recalibrate=Repair(closed_form=True),
    )
    refused(ConfigError, "basis is 2, expected the index of one of the 2 nodes", models, basis=2)
    refused(ParamsError, "node 1: '1.weight' has shape (4, 192), expected (8, 192)", models, state_dicts=[nodes[0]] * 2)
    refused(CalibrationError, "needs calibration inputs", models, recalibrate="refit")
    for wrong in (models[0], 2, [], ["Net", "Net"]):
        with pytest.raises(ConfigError, match="models is not a sequence of modules"):
            merge(models=wrong, state_dicts=nodes)  # type: ignore[arg-type]  # what a user may pass
    with pytest.raises(ConfigError, match="width is for nodes of different widths: pass models"):
        merge(models[0], nodes, width=1)
