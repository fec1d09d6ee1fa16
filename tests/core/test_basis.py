"""Laying a merge onto a reference, weighing nodes of odd size, and telling how well they agree."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.basis import bounded_weights, closest, consensus, into_basis
from tests.core.networks import draws, mlp

SPEC = mlp(5, 12, 9, 3)


def shuffle(params, seed):
    perm = permutation.random(SPEC, torch.Generator().manual_seed(seed))
    return perm, permutation.apply(SPEC, perm, params)


def distance(left, right):
    return sum(float((left[name] - right[name]).square().sum()) for name in left)


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffled_network_is_brought_back(seed):
    (reference,) = draws(SPEC, 1, seed=seed)
    perm, moved = shuffle(reference, seed)
    found = into_basis(SPEC, reference, moved)
    assert permutation.is_identity(permutation.compose(found, perm))


def test_a_network_in_the_basis_already_does_not_move():
    (reference,) = draws(SPEC, 1, seed=3)
    near = {name: value + 0.01 * torch.randn_like(value) for name, value in reference.items()}
    assert permutation.is_identity(into_basis(SPEC, reference, near))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_moved_further_from_the_reference(seed):
    reference, other = draws(SPEC, 2, seed=seed)
    moved = permutation.apply(SPEC, into_basis(SPEC, reference, other), other)
    assert distance(reference, moved) <= distance(reference, other) + 1e-9


def test_the_closest_candidate_wins_and_the_first_of_equals():
    (reference,) = draws(SPEC, 1, seed=1)
    perm, moved = shuffle(reference, 4)
    identity, home = permutation.identity(SPEC), permutation.invert(perm)
    assert closest(SPEC, reference, moved, [identity, home]) is home
    assert closest(SPEC, reference, reference, [identity, dict(identity)]) is identity


def test_weights_of_nodes_of_similar_size_are_left_alone():
    nodes = draws(SPEC, 4, seed=1)
    assert bounded_weights(SPEC, nodes, [1.0, 2.0, 3.0, 4.0]) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("factor", [10.0, 1e3, 1e6])
def test_no_node_pulls_harder_than_two_typical_ones(factor):
    nodes = draws(SPEC, 5, seed=1)
    nodes[2] = {name: factor * value for name, value in nodes[2].items()}
    weights = bounded_weights(SPEC, nodes, [1.0] * 5)
    pulls = [
        weight * sum(float(value.square().sum()) for value in node.values()) ** 0.5
        for node, weight in zip(nodes, weights, strict=True)
    ]
    assert pulls[2] == pytest.approx(2 * sorted(pulls)[2])


def test_dead_networks_have_a_weight_and_a_consensus():
    nodes = [{name: torch.zeros_like(value) for name, value in node.items()} for node in draws(SPEC, 3, seed=1)]
    assert bounded_weights(SPEC, nodes, [1.0] * 3) == [1.0] * 3
    found = consensus(SPEC, nodes, [1.0] * 3)
    assert torch.equal(found.cosines, torch.zeros(3, dtype=torch.float64))


def test_consensus_is_the_cosine_with_the_weighted_sum_of_the_others():
    nodes, weights = draws(SPEC, 4, seed=2, dtype=torch.float64), [0.1, 0.2, 0.3, 0.4]
    flat = torch.stack([torch.cat([value.flatten() for value in node.values()]) for node in nodes])
    found = consensus(SPEC, nodes, weights)
    for index in range(4):
        others = sum(weights[k] * flat[k] for k in range(4) if k != index)
        expected = torch.cosine_similarity(flat[index], others, dim=0)
        torch.testing.assert_close(found.cosines[index], expected)
    torch.testing.assert_close(found.norms, flat.norm(dim=1))
    name = next(iter(nodes[0]))
    layer = torch.stack([node[name].flatten() for node in nodes])
    others = sum(weights[k] * layer[k] for k in range(1, 4))
    torch.testing.assert_close(found.layers[name][0], torch.cosine_similarity(layer[0], others, dim=0))
