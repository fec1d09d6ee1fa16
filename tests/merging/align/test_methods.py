from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.match import match
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.state_dicts import order_by_weight
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.align.base import Nodes
from c2m3_fl.merging.align.methods import METHODS, ActivationMatching
from c2m3_fl.merging.merge import merge
from c2m3_fl.network.calibration_set import CalibrationSet
from tests.merging.networks import CALIBRATION, SEED, equal, nodes, outputs, spec_of

MOVING = [name for name in METHODS if name != "mean"]
PERMUTING = [name for name in MOVING if name != "cca"]
OPTIONS: dict[str, Any] = {"calibration": CALIBRATION, "recalibrate": "none"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", ["mlp", "batch norm", "layer norm"])
def test_identical_nodes_stay_as_they_are(network: str, method: str) -> None:
    model, (node,) = nodes(network, 1)
    merged = merge(model, [node] * 3, spec=spec_of(network), method=method, weights=[1, 2, 5], **OPTIONS)
    assert equal(merged.state_dict, node)


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("network", ["mlp", "layer norm"])
def test_permuted_copies_are_brought_back(network: str, method: str) -> None:
    model, (node,) = nodes(network, 1)
    spec = spec_of(network)
    copies = [node, *(permutation.apply(spec, permutation.random(spec, SEED(seed)), node) for seed in (1, 2))]
    merged = merge(model, copies, spec=spec, method=method, basis=0, **OPTIONS)
    tolerance = 2e-2 if method == "cca" else 1e-4  # its regularisation bends the map by about as much as it adds
    wanted = outputs(model, node, CALIBRATION[0])
    torch.testing.assert_close(
        outputs(model, merged.state_dict, CALIBRATION[0]), wanted, rtol=tolerance, atol=tolerance * float(wanted.std())
    )


@pytest.mark.parametrize("method", PERMUTING)
def test_permuting_methods_leave_every_node_its_function(method: str) -> None:
    model, params = nodes("cnn", 3)
    for index in range(3):
        share = [float(index == other) for other in range(3)]  # the merge is this node, in the basis of node 0
        merged = merge(model, params, spec=spec_of("cnn"), method=method, basis=0, weights=share, **OPTIONS)
        wanted = outputs(model, params[index], CALIBRATION[0])
        torch.testing.assert_close(outputs(model, merged.state_dict, CALIBRATION[0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_respected(method: str) -> None:
    model, params = nodes("mlp", 3)
    options = {**OPTIONS, "spec": spec_of("mlp"), "method": method, "basis": 0}
    alone = merge(model, params, weights=[1, 0, 0], **options).state_dict
    assert equal(alone, params[0])
    even, uneven = (merge(model, params, weights=each, **options).state_dict for each in ([1, 1, 1], [1, 1, 4]))
    assert not torch.equal(even["1.weight"], uneven["1.weight"])


def test_the_mean_moves_nothing() -> None:
    model, params = nodes("mlp", 3)
    merged = merge(model, params, spec=spec_of("mlp"), method="mean", weights=[1, 2, 3])
    wanted = weighted_mean(params, [1, 2, 3])
    for name in wanted:
        torch.testing.assert_close(merged.state_dict[name], wanted[name])
    assert merged.match is None


@pytest.mark.parametrize("method", ["activations", "activations-universe", "cca"])
def test_activations_need_calibration_data(method: str) -> None:
    model, params = nodes("mlp", 2)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        merge(model, params, spec=spec_of("mlp"), method=method)


def test_c2m3_starts_from_activations() -> None:
    model, params = nodes("mlp", 3)
    spec = spec_of("mlp")
    options = {**OPTIONS, "spec": spec, "start": "activations", "weights": [1, 2, 3]}
    found = merge(model, params, **options)
    assert found.match is not None
    moves = ActivationMatching(universe=True).moves(_checked(model, params, spec))
    matched = match(spec, params, weights=[1, 2, 3], start=moves)
    assert found.match.objectives[0] == pytest.approx(matched.objectives[0])
    assert found.match.objectives[-1] >= found.match.objectives[0]
    turned = merge(model, params[::-1], **{**options, "weights": [3, 2, 1]})
    assert equal(found.state_dict, turned.state_dict)
    copies = [params[0], *(permutation.apply(spec, permutation.random(spec, SEED(seed)), params[0]) for seed in (1, 2))]
    back = merge(model, copies, basis=0, **options).state_dict
    assert all(torch.allclose(back[name], params[0][name], atol=1e-6) for name in back)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        merge(model, params, spec=spec, start="activations")


def _checked(model: nn.Module, params: Sequence[dict[str, Tensor]], spec: PermutationSpec) -> Nodes:
    held = CalibrationSet.of(model, OPTIONS["calibration"])
    weights = torch.tensor([1, 2, 3]).double() / 6
    return Nodes(spec, tuple(params), weights, tuple(order_by_weight(params, weights)), 2, model, held)
