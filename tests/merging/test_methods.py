from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.activations import canonical_map, two_sided_features
from c2m3_fl.merging.linear_maps import folded, mapped, normalised, spread_again
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.methods import CCA, METHODS
from c2m3_fl.models.calibration import load_batches
from c2m3_fl.models.program import trace, trace_batches
from c2m3_fl.models.symmetry import permutation_spec
from tests.merging.networks import CALIBRATION, nodes, outputs
from tests.merging.test_merge import SEED, equal, spec_of

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


def test_the_canonical_map_undoes_a_linear_one() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    found = canonical_map(reference, reference @ mixing, 0.0)
    torch.testing.assert_close(reference @ mixing @ found.T, reference)


def test_canonical_maps_undo_the_scales_of_units() -> None:
    model, (node,) = nodes("mlp", 1, torch.float64)
    scale = 0.5 + torch.rand(len(node["1.bias"]), generator=SEED(0)).double()
    scaled = {**node, "1.weight": node["1.weight"] * scale[:, None], "1.bias": node["1.bias"] * scale}
    scaled["3.weight"] = node["3.weight"] / scale  # positive scales pass through a ReLU: the same function
    options = {"calibration": [each.double() for each in CALIBRATION], "recalibrate": "none", "spec": spec_of("mlp")}
    merged = merge(model, [node, scaled], method=CCA(regularisation=1e-12), basis=0, **options)
    inputs = CALIBRATION[0].double()
    torch.testing.assert_close(outputs(model, merged.state_dict, inputs), outputs(model, node, inputs))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_layer_that_does_not_vary_is_left_in_its_own_basis(dead: int) -> None:
    """There is nothing to map it by, and a map onto nothing has no inverse."""
    model, params = nodes("mlp", 2)
    still = dict(params[dead])
    first = next(iter(still))
    still[first] = torch.zeros_like(still[first])
    params = [still if index == dead else node for index, node in enumerate(params)]
    merged = merge(model, params, calibration=[CALIBRATION[0]], recalibrate="none", method="cca")
    assert all(bool(torch.isfinite(value).all()) for value in merged.state_dict.values())


def test_targets_from_nodes_that_no_longer_compute_the_same_are_noted() -> None:
    model, params = nodes("batch norm", 2)
    options = {"calibration": [CALIBRATION[0]], "spec": spec_of("batch norm")}
    for method, recalibrate, noted in (("cca", "repair", True), ("cca", "batchnorm", False), ("c2m3", "repair", False)):
        notes = merge(model, params, method=method, recalibrate=recalibrate, **options).report.notes
        assert any("linear maps change" in note for note in notes) == noted


def test_units_are_compared_where_they_are_made_and_where_they_are_read() -> None:
    model, (node,) = nodes("mlp", 1, torch.float64)
    spec, batches = spec_of("mlp"), load_batches([CALIBRATION[0].double()])
    found = two_sided_features(spec, trace_batches(model, batches), batches, node)
    made = nn.functional.linear(CALIBRATION[0].double().flatten(1), node["1.weight"], node["1.bias"])
    ((_, segment),) = spec.tensors["1.bias"].segments
    features = found[segment.group]
    wanted = torch.cov(made.T, correction=0) + torch.cov(made.relu().T, correction=0)
    torch.testing.assert_close(features.T @ features, wanted)


def test_maps_and_their_inverses_cancel_in_a_linear_network() -> None:
    _, (node,) = nodes("mlp", 1, torch.float64)
    spec = spec_of("mlp")
    generator = torch.Generator().manual_seed(0)
    maps = {
        name: torch.randn(group.size, group.size, generator=generator, dtype=torch.float64)
        for name, group in spec.groups.items()
    }
    moved = mapped(spec, maps, node)

    def linear(params: dict[str, Tensor]) -> Tensor:
        rows = CALIBRATION[0].double().flatten(1)
        for layer in ("1", "3", "5"):
            rows = nn.functional.linear(rows, params[f"{layer}.weight"], params[f"{layer}.bias"])
        return rows

    torch.testing.assert_close(linear(moved), linear(node))


def test_linear_maps_pass_through_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().eval()
    generator = torch.Generator().manual_seed(0)
    node = {
        name: value if value.dtype == torch.int64 else 0.5 + torch.rand(value.shape, generator=generator).double()
        for name, value in model.state_dict().items()
    }
    node["1.weight"][2] *= -1
    inputs = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    spec = permutation_spec(model, inputs)
    pairs = normalised(trace(model, (inputs,)))
    maps = {name: torch.randn(6, 6, generator=generator, dtype=torch.float64) for name in spec.groups}
    given = folded(pairs, node)
    moved = mapped(spec, maps, given)
    spread_again(pairs, spec, maps, given, moved)
    wanted = outputs(model, node, inputs)
    torch.testing.assert_close(outputs(model, given, inputs), wanted)
    torch.testing.assert_close(outputs(model, moved, inputs), wanted)


def test_cca_says_where_linear_maps_are_no_symmetry() -> None:
    spec = spec_of("mlp")
    heads = {"head": Group(2), "inner": Group(4, parent="head")}  # sit on no tensor, so the spec still holds
    nested = PermutationSpec({**spec.groups, **heads}, spec.tensors)
    model, params = nodes("mlp", 2)
    with pytest.raises(ConfigError, match="inside the blocks of 'head' only"):
        merge(model, params, spec=nested, method=CCA(), **OPTIONS)
