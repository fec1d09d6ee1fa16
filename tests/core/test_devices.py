"""On another device the core finds what it finds on the CPU in double precision, and its results are on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import assignment, gradients, join, match, match_in_batches, permutation, weighted_mean
from c2m3_fl.core.basis import bounded_weights, consensus, into_basis
from c2m3_fl.core.joining import match_bounded
from c2m3_fl.core.outliers import find_outliers
from c2m3_fl.core.pairwise import merge_many, weight_matching
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from tests.core.networks import ALL, draws, mlp, planted
from tests.core.rotating import ROTATING, draw
from tests.standin import DEVICE, standin

EXACT, SINGLE = 1e-9, 1e-5  # of the largest entry, and of the agreement
LARGE = mlp(20, 120, 110, 10)  # so many units that potentials are used


def there(nodes: Sequence[Params], device: torch.device) -> list[dict[str, Tensor]]:
    return [{name: value.to(device) for name, value in node.items()} for node in nodes]


def assert_close(found: Any, expected: Any, tolerance: float = EXACT) -> None:
    """Numbers and tensors agree, permutations exactly."""
    if isinstance(expected, Tensor):
        scale = float(expected.double().abs().max()) if expected.numel() else 0.0
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance * scale)
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], tolerance)
    elif isinstance(expected, tuple | list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance)
    else:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def assert_same_match(found: Any, expected: Any, tolerance: float = EXACT) -> None:
    assert_close(found.permutations, expected.permutations)
    assert {index.device.type for perm in found.permutations for index in perm.values()} <= {"cpu"}
    assert_close(found.objectives[-1], expected.objectives[-1], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("network", ALL)
def test_a_match_is_the_same_one(network: str, device: torch.device) -> None:
    nodes = draws(ALL[network], 2)
    assert_same_match(match(ALL[network], there(nodes, device)), match(ALL[network], nodes))


@pytest.mark.slow
def test_so_are_reheatings(device: torch.device) -> None:
    nodes = draws(ALL["mlp"], 4)
    assert_same_match(match(ALL["mlp"], there(nodes, device)), match(ALL["mlp"], nodes))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["identity", "profiles", "barycentre", "sinkhorn", "random"])
def test_from_every_start(start: str, device: torch.device) -> None:
    nodes = draws(ALL["attention"], 2)
    options = {"start": start, "together": None if start == "barycentre" else 1, "balance": start == "random"}
    spec = ALL["attention"]
    assert_same_match(match(spec, there(nodes, device), **options), match(spec, nodes, **options))


@pytest.mark.slow
@pytest.mark.parametrize("network", ROTATING)
def test_rotations(network: str, device: torch.device) -> None:
    nodes = [draw(ROTATING[network], seed) for seed in range(2)]
    found, expected = (match(ROTATING[network], each, max_steps=2) for each in (there(nodes, device), nodes))
    assert_close(found.permutations, expected.permutations, 1e-6)
    assert_close(found.objectives[-1], expected.objectives[-1])


@pytest.mark.parametrize("least", [100, 1000], ids=["potentials there", "potentials here"])
def test_many_units_in_single_precision_find_what_double_precision_finds(
    least: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "LEAST", least)
    if least < 120:
        for name in ("_LARGE", "_CALL"):  # gradients are kept
            monkeypatch.setattr(gradients, name, 0)
    nodes, _ = planted(LARGE, 2, noise=0.3, seed=0)
    single = [{name: value.float() for name, value in node.items()} for node in nodes]
    expected, found = match(LARGE, nodes), match(LARGE, there(single, device))
    assert_same_match(match(LARGE, there(nodes, device)), expected)
    assert_close(found.between(0, 1), expected.between(0, 1))  # which order the universe has is up to a checksum
    assert_close(found.objectives[-1], expected.objectives[-1], SINGLE)


def test_weightless_nodes_and_known_permutations(device: torch.device) -> None:
    nodes, maps = planted(ALL["mlp"], 3, noise=0.5, seed=1)
    start = there(maps, device)
    options = {"weights": [1, 0, 2]}
    assert_same_match(match(ALL["mlp"], there(nodes, device), **options), match(ALL["mlp"], nodes, **options))
    assert_same_match(match(ALL["mlp"], there(nodes, device), start=start), match(ALL["mlp"], nodes, start=maps))
    joined = join(ALL["mlp"], there(nodes, device)[0], there(nodes, device)[1:], start=start[1:])
    assert_same_match(joined, join(ALL["mlp"], nodes[0], nodes[1:], start=maps[1:]))


def test_nodes_that_are_matched_already_are_proven_to_be(device: torch.device) -> None:
    nodes, _ = planted(LARGE, 1, noise=0.0, seed=0)
    near = [{k: v * (1 + 1e-6 * i) for k, v in nodes[0].items()} for i in range(4)]
    found = match(LARGE, there(near, device))
    assert found.steps == 0
    assert len(found.objectives) == 2
    assert_same_match(found, match(LARGE, near))


@pytest.mark.slow
def test_batches_and_baselines(device: torch.device) -> None:
    spec = ALL["convolutional"]
    nodes = draws(spec, 3)
    away = there(nodes, device)
    found, expected = (match_in_batches(spec, each, batch=2, passes=2) for each in (away, nodes))
    assert_close(found.permutations, expected.permutations)
    assert_close(found.objective, expected.objective)
    assert_close(found.universe, expected.universe)
    assert {value.device.type for value in found.universe.values()} == {device.type}
    assert_same_match(match_bounded(spec, away, [1.0] * 3, 2), match_bounded(spec, nodes, [1.0] * 3, 2))
    assert_close(merge_many(spec, away), merge_many(spec, nodes))
    assert_close(weight_matching(spec, *away[:2]), weight_matching(spec, *nodes[:2]))
    assert_close(into_basis(spec, *away[:2]), into_basis(spec, *nodes[:2]))


@pytest.mark.slow
def test_nodes_of_two_devices_are_matched_where_the_first_one_is(device: torch.device) -> None:
    spec = ALL["mlp"]
    nodes = draws(spec, 3)
    mixed = [*there(nodes[:2], device), *nodes[2:]]
    assert_same_match(match(spec, mixed), match(spec, nodes))
    assert_close(match_in_batches(spec, mixed, batch=2).universe, match_in_batches(spec, nodes, batch=2).universe)


@pytest.mark.parametrize("network", ["convolutional", "grouped"])
def test_averages_scores_and_moved_networks(network: str, device: torch.device) -> None:
    spec = ALL[network]
    nodes = [*draws(spec, 5), {name: value * 100 for name, value in draws(spec, 1)[0].items()}]
    away = there(nodes, device)
    assert_close(weighted_mean(away, [1, 2, 3, 4, 5, 6]), weighted_mean(nodes, [1, 2, 3, 4, 5, 6]))
    assert_close(vars(consensus(spec, away, [1.0] * 6)), vars(consensus(spec, nodes, [1.0] * 6)))
    assert_close(bounded_weights(spec, away, [1.0] * 6), bounded_weights(spec, nodes, [1.0] * 6))
    assert find_outliers(spec, away, away[0]) == find_outliers(spec, nodes, nodes[0]) != {}
    drawn = permutation.random(spec, torch.Generator().manual_seed(0))
    moved = permutation.apply(spec, there([drawn], device)[0], away[0])
    assert_close(moved, permutation.apply(spec, drawn, nodes[0]), 0.0)
    assert {value.device.type for value in moved.values()} == {device.type}


def test_values_that_are_not_finite_are_named(device: torch.device) -> None:
    nodes = draws(ALL["mlp"], 2)
    nodes[1]["0.bias"][0] = math.nan
    with pytest.raises(ParamsError, match=r"node 1: '0\.bias' has 1 values that are NaN or infinite"):
        match(ALL["mlp"], there(nodes, device))


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with standin() as place:
        away, here = torch.zeros(3).to(place), torch.zeros(3)
        with pytest.raises(RuntimeError, match="to be on the same device"):
            away + here
        with pytest.raises(RuntimeError, match="to be on the same device"):
            away.index_select(0, torch.arange(2))
        with pytest.raises(TypeError, match=r"Tensor\.cpu"):
            away.numpy()
        assert torch.equal((away + 1.0)[torch.arange(2)].cpu(), torch.ones(2))
        assert (away + torch.ones(())).device == torch.zeros(1, device=place).device == DEVICE
