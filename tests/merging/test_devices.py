"""On another device networks are traced, merged and recalibrated as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl import check_invariance, merge, permutation_spec
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.evaluate.barrier import barrier
from c2m3_fl.merging.recalibrate.shift import channel_moments
from tests.merging.networks import CALIBRATION, NETWORKS, nodes
from tests.merging.networks import batch_norm as make

pytestmark = pytest.mark.slow  # the stand-in takes half a minute for a merge

EXACT = 1e-9  # of a tensor's largest entry, in double precision
DATA = [(images.double(), torch.arange(len(images)) % 5) for images in CALIBRATION]
INPUTS = DATA[0][0]
MODEL, NODES = nodes("batch norm", 3, torch.float64)
SPEC = permutation_spec(MODEL, INPUTS)


def there(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: there(each, device) for name, each in value.items()}
    return type(value)(there(each, device) for each in value) if isinstance(value, list | tuple) else value.to(device)


def on(device: torch.device) -> nn.Module:
    model = make().double().eval().to(device)
    model.load_state_dict(MODEL.state_dict())
    return model


def assert_close(found: Params, expected: Params) -> None:
    for name, value in expected.items():
        scale = float(value.double().abs().max())
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=EXACT * scale)


def test_a_network_has_the_same_symmetries(device: torch.device) -> None:
    """Wherever its example inputs are."""
    network = on(device)
    for inputs in (INPUTS.to(device), INPUTS):
        assert permutation_spec(network, inputs) == SPEC
        assert check_invariance(network, SPEC, inputs) < EXACT
    assert {value.device.type for value in network.state_dict().values()} == {device.type}


@pytest.mark.parametrize("recalibrate", ["none", "repair", "refit", "batchnorm", "auto"])
def test_a_merge_is_the_same_one(recalibrate: str, device: torch.device) -> None:
    options: dict[str, Any] = {"spec": SPEC, "recalibrate": recalibrate}
    expected = merge(MODEL, NODES, calibration=DATA, **options).state_dict
    asked = merge(MODEL, NODES, calibration=DATA, device=device, **options).state_dict
    assert_close(asked, expected)
    assert {value.device.type for value in asked.values()} == {"cpu"}, "where the nodes were"
    found = merge(on(device), there(NODES, device), calibration=DATA, **options).state_dict
    assert_close(found, expected)
    assert {value.device.type for value in found.values()} == {device.type}


@pytest.mark.parametrize("method", ["mean", "git-rebasin", "mergemany", "activations", "activations-universe", "cca"])
def test_so_is_one_by_any_method(method: str, device: torch.device) -> None:
    options: dict[str, Any] = {"spec": SPEC, "method": method, "calibration": DATA[:1], "recalibrate": "none"}
    found = merge(MODEL, NODES, device=device, **options).state_dict
    assert_close(found, merge(MODEL, NODES, **options).state_dict)


def test_so_is_one_from_activations_with_moments(device: torch.device) -> None:
    moments = [channel_moments(MODEL, node, DATA[:1]) for node in NODES]
    away = [channel_moments(on(device), node, DATA[:1]) for node in there(NODES, device)]
    options: dict[str, Any] = {"spec": SPEC, "calibration": DATA, "start": "activations", "recalibrate": "auto"}
    expected = merge(MODEL, NODES, moments=moments, **options).state_dict
    assert_close(merge(MODEL, NODES, moments=moments, device=device, **options).state_dict, expected)
    assert_close(merge(on(device), there(NODES, device), moments=away, **options).state_dict, expected)


def test_rotations(device: torch.device) -> None:
    from tests.symmetry.streams import made

    inputs = torch.randn(8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = made("pre-norm").double()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    other = {name: value + 0.1 * torch.randn_like(value) for name, value in own.items()}
    options: dict[str, Any] = {"calibration": [inputs], "rotations": True, "recalibrate": "repair"}
    spec = permutation_spec(model, inputs, rotations=True)
    expected = merge(model, [own, other], spec=spec, **options).state_dict
    found = merge(model, there([own, other], device), spec=spec, **options).state_dict
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=1e-6)


def test_networks_of_two_widths(device: torch.device) -> None:
    def narrow(width: int) -> nn.Module:
        torch.manual_seed(width)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 5)).double()

    models = [narrow(8), narrow(6)]
    state_dicts = [model.state_dict() for model in models]
    options: dict[str, Any] = {"models": models, "calibration": DATA, "recalibrate": "repair"}
    expected = merge(state_dicts=state_dicts, **options).state_dict
    assert_close(merge(state_dicts=state_dicts, device=device, **options).state_dict, expected)
    found = merge(state_dicts=there(state_dicts, device), **options).state_dict
    assert_close(found, expected)
    assert {value.device.type for value in found.values()} == {device.type}


def test_a_barrier_is_the_same_one(device: torch.device) -> None:
    expected = barrier(MODEL, *NODES[:2], DATA, points=3)
    found = barrier(on(device), *there(NODES[:2], device), DATA, points=3)
    assert [each.loss for each in found.scores] == pytest.approx([each.loss for each in expected.scores], rel=EXACT)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "batch norm"])
def test_every_kind_of_network(network: str, device: torch.device) -> None:
    model, states = nodes(network, 2, torch.float64)
    options: dict[str, Any] = {"calibration": DATA[:1], "recalibrate": "repair"}
    spec = permutation_spec(model, INPUTS)
    expected = merge(model, states, spec=spec, **options).state_dict
    assert_close(merge(model, states, spec=spec, device=device, **options).state_dict, expected)


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("cuda:77", "gpu", "meta"):
        with pytest.raises(ConfigError, match=f"device is '{device}', which cannot be used here"):
            merge(MODEL, NODES, spec=SPEC, device=device)


def test_tensors_of_single_precision(device: torch.device) -> None:
    """Up to rounding: a merge from permutations that double precision finds as well."""
    model, states = nodes("mlp", 2)
    twin: list[dict[str, Tensor]] = [states[0], {name: v + 1e-3 * states[1][name] for name, v in states[0].items()}]
    options: dict[str, Any] = {"calibration": CALIBRATION, "recalibrate": "repair", "example_inputs": CALIBRATION[0]}
    expected = merge(model.double(), there_double(twin), **{**options, "calibration": DATA, "example_inputs": INPUTS})
    found = merge(model.float(), twin, device=device, **options).state_dict
    for name, value in expected.state_dict.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-5 * float(value.abs().max()))


def there_double(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value.double() for name, value in state.items()} for state in states]
