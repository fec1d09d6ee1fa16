"""What has a say in a match: weights of nodes, buffers, types, and the scales of tensors."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.errors import ParamsError
from tests.core.networks import (
    convolutional,
    draws,
    mlp,
    pairwise_agreement,
    planted,
    same,
)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
def test_a_node_of_weight_zero_is_aligned_all_the_same(weights):
    spec = mlp(12, 24, 24, 6)
    nodes, perms = planted(spec, 3, 0.05, seed=1)
    result = match(spec, nodes, weights=weights)
    for i in range(3):
        assert same(result.between(i, 0), permutation.between(perms[i], perms[0]))


def test_buffers_and_counters_have_no_say():
    spec = convolutional()
    nodes = draws(spec, 3, seed=4)
    loud = [
        {**node, "bn1.running_mean": 1e6 * node["bn1.running_mean"], "bn1.num_batches_tracked": torch.tensor(7)}
        for node in nodes
    ]
    quiet = [{**node, "bn1.running_mean": torch.zeros(4), "bn1.num_batches_tracked": torch.tensor(7)} for node in nodes]
    assert match(spec, loud).objectives[-1] == pytest.approx(match(spec, quiet).objectives[-1], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_matched_in_float32(dtype):
    spec = mlp(6, 8, 8, 3)
    nodes = [{name: value.to(dtype) for name, value in node.items()} for node in planted(spec, 3, 0.1, seed=0)[0]]
    wide = [{name: value.float() for name, value in node.items()} for node in nodes]
    narrow, reference = match(spec, nodes), match(spec, wide)
    assert narrow.objectives[-1] == pytest.approx(reference.objectives[-1], rel=1e-6)


def test_balanced_matching_does_not_hear_the_loudest_layer():
    # The second layer's weights are a thousand times too large and pure noise; the others are planted.
    spec = mlp(12, 24, 24, 6)
    found = {True: 0, False: 0}
    for seed in range(5):
        nodes, perms = planted(spec, 3, 0.1, seed)
        noise = draws(spec, 3, seed=100 + seed)
        nodes = [{**node, "1.weight": 1e3 * other["1.weight"]} for node, other in zip(nodes, noise, strict=True)]
        for balance in found:
            result = match(spec, nodes, balance=balance)
            wanted = permutation.between(perms[0], perms[1])
            found[balance] += int((result.between(0, 1)["h0"] == wanted["h0"]).sum())
    assert found[True] > found[False]


def test_a_node_of_weight_zero_is_balanced_like_the_others():
    spec = mlp(12, 24, 24, 6)
    right = 0
    for seed in range(5):
        nodes, perms = planted(spec, 3, 0.1, seed)
        noise = draws(spec, 3, seed=100 + seed)
        nodes = [{**node, "1.weight": 1e3 * other["1.weight"]} for node, other in zip(nodes, noise, strict=True)]
        result = match(spec, nodes, weights=[1.0, 1.0, 0.0], balance=True)
        right += int((result.between(0, 2)["h0"] == permutation.between(perms[0], perms[2])["h0"]).sum())
    assert right >= 0.9 * 5 * 24


@pytest.mark.parametrize("heavy", [1e3, 1e5, 1e6])
def test_a_heavy_node_does_not_drown_the_agreement_of_the_others(heavy):
    spec, weights = mlp(12, 24, 24, 6), [heavy, 1.0, 1.0, 1.0]
    nodes, perms = planted(spec, 4, 0.1, seed=0)
    nodes = [{name: value.float() for name, value in node.items()} for node in nodes]
    result = match(spec, nodes, weights=weights)
    shares = [weight / sum(weights) for weight in weights]
    assert result.objectives[-1] == pytest.approx(
        pairwise_agreement(spec, nodes, result.permutations, shares), rel=1e-5
    )
    assert all(same(result.between(0, i), permutation.between(perms[0], perms[i])) for i in range(4))


@pytest.mark.parametrize("size", [24, 128])
def test_values_too_large_for_their_dtype_are_named_and_tiny_ones_are_matched(size):
    spec = mlp(12, size, 6)
    nodes, perms = planted(spec, 3, 0.05, seed=0)
    huge = [{name: 1e25 * value.float() for name, value in node.items()} for node in nodes]
    with pytest.raises(ParamsError, match="overflows: the nodes' values are too large for their dtype"):
        match(spec, huge)
    tiny = [{name: (1e-15 * value).float() for name, value in node.items()} for node in nodes]
    found = match(spec, tiny)
    assert same(found.between(0, 1), permutation.between(perms[0], perms[1]))


def test_balance_does_not_hear_the_scale_of_a_tensor():
    spec = mlp(6, 8, 8, 3)
    nodes = draws(spec, 3)
    scaled = [{**node, "1.weight": 1024.0 * node["1.weight"]} for node in nodes]  # a power of two: no rounding
    here, there = match(spec, nodes, balance=True), match(spec, scaled, balance=True)
    assert there.objectives == pytest.approx(here.objectives, rel=1e-9)
