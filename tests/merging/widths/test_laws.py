"""Laws of merges of different widths."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.align.linear_maps import axis_roles
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.widths.injections import carry, injection
from c2m3_fl.network.program import export_program
from c2m3_fl.symmetry.discover import permutation_spec
from tests.merging.networks import CALIBRATION, SEED, equal, lively, outputs
from tests.merging.widths.networks import WIDTHS, split_in_two, without_units

FEW = CALIBRATION[:1]
SPECS: dict[tuple[str, int], PermutationSpec] = {}
FAST = ("mlp", "batch norm")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in WIDTHS]
EXACT = Refit(strengths=(1e-10,))


def build(name: str, width: int) -> nn.Module:
    return WIDTHS[name](width).eval()


def spec_of(name: str, width: int) -> PermutationSpec:
    if (name, width) not in SPECS:
        SPECS[name, width] = permutation_spec(build(name, width), FEW[0])
    return SPECS[name, width]


def padded(spec: PermutationSpec, wide: PermutationSpec, params: dict[str, Tensor]) -> dict[str, Tensor]:
    return carry(spec, wide, injection(spec, wide, permutation.identity(wide)), params)


@pytest.mark.parametrize("recalibrate", ["none", "repair", "refit"])
def test_equal_widths_give_what_they_gave_without_models_bit_for_bit(recalibrate: str) -> None:
    models = [build("mlp", 2) for _ in range(3)]
    nodes = [lively(models[0], seed) for seed in range(3)]
    options: dict[str, Any] = {"calibration": CALIBRATION, "recalibrate": recalibrate, "weights": [1, 2, 3]}
    wanted = merge(models[0], nodes, **options)
    for width in (None, 1, build("mlp", 2)):
        assert equal(merge(models=models, state_dicts=nodes, width=width, **options).state_dict, wanted.state_dict)
    iterators: dict[str, Any] = {"models": iter(models), "state_dicts": iter(nodes)}
    assert equal(merge(**iterators, **options).state_dict, wanted.state_dict)


def test_dead_units_of_a_node_change_neither_the_agreement_nor_the_live_maps_nor_the_merge() -> None:
    specs = [spec_of("mlp", width) for width in (2, 3, 4)]
    models = [build("mlp", width) for width in (2, 3, 4)]
    nodes = [lively(model, seed) for seed, model in enumerate(models)]
    live = merge(models=models, state_dicts=nodes, example_inputs=FEW[0])
    nodes[0] = padded(specs[0], specs[1], nodes[0])
    dead = merge(models=[models[1], *models[1:]], state_dicts=nodes, example_inputs=FEW[0])
    assert live.report.objectives is not None
    assert dead.report.objectives is not None
    assert dead.report.objectives[1] == pytest.approx(live.report.objectives[1], rel=1e-6)
    assert equal(live.state_dict, dead.state_dict)
    assert live.widths is not None
    assert dead.widths is not None
    for node in (1, 2):
        for name, units in live.widths.between(0, node).items():
            found = dead.widths.between(0, node)[name]
            assert torch.equal(found[: len(units)], units)
            assert (found[len(units) :] == -1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_network_and_a_permuted_copy_without_some_of_its_units_are_matched_exactly_on_the_rest(name: str) -> None:
    wide, narrow = spec_of(name, 4), spec_of(name, 2)
    models = [build(name, 4), build(name, 2)]
    whole = lively(models[0], 0)
    planted = permutation.random(narrow, SEED(1))
    part = permutation.apply(narrow, planted, without_units(wide, narrow, whole))
    merged = merge(models=models, state_dicts=[whole, part], example_inputs=FEW[0], width=1)
    assert merged.widths is not None
    numbered = {tensor: torch.arange(value.numel()).reshape(value.shape) for tensor, value in whole.items()}
    wanted = permutation.apply(narrow, planted, without_units(wide, narrow, numbered))
    assert equal(carry(wide, narrow, merged.widths.between(1, 0), numbered), wanted)
    for tensor, value in part.items():
        torch.testing.assert_close(merged.state_dict[tensor], value)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_and_its_widened_copy_merge_to_the_same_outputs(name: str) -> None:
    narrow, wide = spec_of(name, 2), spec_of(name, 4)
    models = [build(name, 2), build(name, 4)]
    node = lively(models[0], 0)
    roles = axis_roles(narrow, export_program(models[0], FEW[0]))
    reads = {tensor: axis for tensor, found in roles.items() for axis in found if axis is not None}
    twin = split_in_two(narrow, wide, node, reads)
    wanted = outputs(models[0], node, FEW[0])
    torch.testing.assert_close(outputs(models[1], twin, FEW[0]), wanted, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"calibration": CALIBRATION, "recalibrate": EXACT}
    targets: dict[str, list[nn.Module | int]] = {"mlp": [1, 0, build("mlp", 3)], "lstm": [1], "fused": [1]}
    for width in targets.get(name, [1, 0]):  # nothing refits recurrent layers and parts of matrices after a cut
        merged = merge(models=models, state_dicts=[node, twin], width=width, **options)
        target = width if isinstance(width, nn.Module) else models[width]
        torch.testing.assert_close(outputs(target, merged.state_dict, FEW[0]), wanted, rtol=1e-3, atol=1e-3)


def test_maps_through_a_third_node_are_contained_in_the_direct_one_and_equal_where_it_has_the_unit() -> None:
    models = [build("batch norm", width) for width in (4, 2, 3)]
    nodes = [lively(model, seed) for seed, model in enumerate(models)]
    widths = merge(models=models, state_dicts=nodes, example_inputs=FEW[0]).widths
    assert widths is not None
    for a, b, c in permutations(range(3)):
        direct = widths.between(a, c)
        for name, via in widths.between(a, b).items():
            through = torch.where(via >= 0, widths.between(b, c)[name][via.clamp_min(0)], -1)
            known = via >= 0
            assert torch.equal(through[known], direct[name][known])
            assert (through[~known] == -1).all()


@pytest.mark.parametrize("recalibrate", ["none", "refit"])
def test_the_order_of_the_nodes_does_not_matter_to_a_bit(recalibrate: str) -> None:
    models = [build("mlp", width) for width in (2, 4, 3)]
    nodes = [lively(model, seed) for seed, model in enumerate(models)]
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        chosen: dict[str, Any] = {"models": [models[i] for i in order], "state_dicts": [nodes[i] for i in order]}
        weights = [[1.0, 2.0, 2.0][i] for i in order]
        found.append(merge(**chosen, weights=weights, calibration=FEW, recalibrate=recalibrate).state_dict)
    assert equal(*found)


@pytest.mark.parametrize(("recalibrate", "width"), [("repair", None), ("auto", 0), ("batchnorm", None)])
def test_every_recalibration_takes_nodes_of_different_widths(recalibrate: str, width: int | None) -> None:
    models = [build("batch norm", each) for each in (2, 4)]
    nodes = [lively(model, seed) for seed, model in enumerate(models)]
    merged = merge(models=models, state_dicts=nodes, width=width, calibration=CALIBRATION, recalibrate=recalibrate)
    done = merged.report.recalibration
    assert done is not None
    assert done.operators
    assert outputs(models[1 if width is None else width], merged.state_dict, FEW[0]).isfinite().all()
