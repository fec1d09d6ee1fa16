"""The baselines: weight matching and MergeMany."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.core.pairwise import merge_many, pairwise_matching, weight_matching
from tests.core.networks import ALL, draws, mlp, pairwise_agreement, planted

each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@each_spec
def test_weight_matching_never_loses_and_stays_inside_the_spec(spec):
    reference, node = draws(spec, 2, seed=1)
    perm, here = weight_matching(spec, reference, node), permutation.identity(spec)
    permutation.validate(spec, perm)
    before, after = (pairwise_agreement(spec, [reference, node], [here, p], [0.5, 0.5]) for p in (here, perm))
    assert after >= before - 1e-12 * abs(before)


@each_spec
def test_merge_many_never_loses(spec):
    nodes, here = draws(spec, 4, seed=2), [permutation.identity(spec)] * 4
    perms = merge_many(spec, nodes)
    before, after = (pairwise_agreement(spec, nodes, p, [0.25] * 4) for p in (here, perms))
    assert after >= before - 1e-12 * abs(before)
    assert permutation.cycle_error(perms) == 0


def test_planted_permutations_are_found():
    # Seeds 0 to 9, three noisy copies, noise 0.1.
    spec, found = mlp(12, 24, 24, 6), {"pairwise": 0, "merge many": 0}
    for seed in range(10):
        nodes, perms = planted(spec, 3, 0.1, seed)
        wanted = [permutation.between(perms[0], perm) for perm in perms]
        for name, maps in (("pairwise", pairwise_matching(spec, nodes)), ("merge many", merge_many(spec, nodes))):
            found[name] += all(same(permutation.between(maps[0], maps[i]), wanted[i]) for i in range(3))
    assert min(found.values()) >= 8


def test_the_universe_beats_pairwise_maps():
    # Sums over seeds 0 to 4, six copies with noise as large as the network; single seeds may go either way.
    spec, total = mlp(12, 24, 24, 6), {"universe": 0.0, "merge many": 0.0, "pairwise": 0.0}
    for seed in range(5):
        nodes, _ = planted(spec, 6, 1.0, seed)
        for name, perms in (
            ("universe", match(spec, nodes).permutations),
            ("merge many", merge_many(spec, nodes)),
            ("pairwise", pairwise_matching(spec, nodes)),
        ):
            total[name] += pairwise_agreement(spec, nodes, perms, [1 / 6] * 6)
    assert total["universe"] > total["merge many"] > total["pairwise"]


def test_one_node_needs_no_merge():
    spec = mlp(2, 3, 2)
    assert all(permutation.is_identity(perm) for perm in merge_many(spec, draws(spec, 1)))
