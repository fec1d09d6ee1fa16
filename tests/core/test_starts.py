"""Where the search starts: profiles find copies outright, and are taken by default where they agree more."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool
from c2m3_fl.core.joining import join
from c2m3_fl.core.match import match
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.profiles import profiles
from c2m3_fl.core.starts import begin
from tests.core.networks import ALL, draws, mlp, pairwise_agreement, planted

each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def started(spec, nodes, start="profiles", frozen=0):
    """The start as permutations, one for every node."""
    problem = Problem.of(spec, nodes, torch.full((len(nodes),), 1 / len(nodes), dtype=torch.float64), frozen)
    with assignment_pool() as pool:
        point, _ = begin(problem, start, None, pool)
    assert not point.places
    return [{name: rows[i] for name, rows in point.frames.items()} for i in range(len(nodes))]


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_profiles_find_the_permutations_of_copies(spec, dtype):
    for seed in range(20):
        nodes, perms = planted(spec, 3, 0.0, seed, dtype)
        for found, wanted in zip(started(spec, nodes), perms, strict=True):
            assert same(found, wanted)


@each_spec
def test_profiles_bear_noise(spec):
    # No law, but a margin: 3 nodes, noise of 1 % of the weights' own size, seeds 0 to 19.
    found = 0
    for seed in range(20):
        nodes, perms = planted(spec, 3, 0.01, seed)
        found += all(same(found, wanted) for found, wanted in zip(started(spec, nodes), perms, strict=True))
    assert found >= 18


@each_spec
def test_profiles_do_not_depend_on_any_permutation(spec):
    (node,) = draws(spec, 1, seed=3)
    move = permutation.random(spec, torch.Generator().manual_seed(4))
    weights = torch.ones(1, dtype=torch.float64)
    here, there = (Problem.of(spec, [x], weights) for x in (node, permutation.apply(spec, move, node)))
    for left, right in zip(here.terms, there.terms, strict=True):
        for axis, group in enumerate(left.groups):
            assert torch.equal(profiles(left, axis, 0)[move[group]], profiles(right, axis, 0))


@each_spec
def test_long_profiles_keep_their_weight(spec, monkeypatch):
    """With fewer numbers per unit the squared norm stays of the size that it had: what is left out is made up for."""
    (node,) = draws(spec, 1, seed=5)
    (term, *_) = (t for t in Problem.of(spec, [node], torch.ones(1, dtype=torch.float64)).terms if len(t.groups) > 1)
    whole = profiles(term, 0, 0).square().sum()
    assert whole == pytest.approx(float(term.value.square().sum()))
    monkeypatch.setattr("c2m3_fl.core.profiles._LENGTH", term.value.shape[3])
    short = profiles(term, 0, 0)
    assert short.numel() == term.value.shape[1] * term.value.shape[3:].numel()
    assert 0.1 * whole < short.square().sum() < 10 * whole


@each_spec
def test_permuting_the_nodes_changes_the_agreement_found_by_nothing_but_rounding(spec):
    """The identity as start knows how the nodes came; profiles do not."""
    nodes = draws(spec, 3, seed=7)
    generator = torch.Generator().manual_seed(8)
    moved = [permutation.apply(spec, permutation.random(spec, generator), node) for node in nodes]
    here, there = (match(spec, each, start="profiles") for each in (nodes, moved))
    assert there.objectives == pytest.approx(here.objectives, rel=1e-10)


@each_spec
def test_the_default_starts_where_the_nodes_agree_more(spec):
    for seed in range(5):
        for nodes in (draws(spec, 3, seed=seed), planted(spec, 3, 0.0, seed)[0], [draws(spec, 1, seed=seed)[0]] * 3):
            names = ("auto", "identity", "profiles")
            auto, identity, matched = (
                pairwise_agreement(spec, nodes, started(spec, nodes, name), [1 / 3] * 3) for name in names
            )
            assert auto == pytest.approx(max(identity, matched), rel=1e-12)


def test_nodes_that_agree_as_they_stand_stay_there():
    spec = mlp(6, 8, 8, 3)
    nodes, perms = planted(spec, 3, 0.1, seed=0)
    aligned = [permutation.apply(spec, perm, node) for perm, node in zip(perms, nodes, strict=True)]
    identity = permutation.identity(spec)
    assert all(same(perm, identity) for perm in started(spec, aligned, "auto"))


def test_the_course_of_the_agreement_begins_where_the_nodes_stand():
    spec = mlp(12, 24, 24, 6)
    nodes, _ = planted(spec, 3, 0.3, seed=1)
    here = pairwise_agreement(spec, nodes, [permutation.identity(spec)] * 3, [1 / 3] * 3)
    found = match(spec, nodes)
    assert found.objectives[0] == pytest.approx(here, rel=1e-9)
    assert found.objectives[1] == pytest.approx(match(spec, nodes, start="profiles").objectives[0], rel=1e-12)
    assert list(found.objectives) == sorted(found.objectives)


@pytest.mark.parametrize("name", ["mlp", "attention", "grouped"])
def test_a_frozen_universe_is_what_joining_nodes_are_compared_with(name):
    spec = ALL[name]
    nodes, perms = planted(spec, 3, 0.0, seed=2)
    found = join(spec, nodes[0], nodes[1:])
    assert same(started(spec, nodes, frozen=1)[0], permutation.identity(spec))
    assert all(same(perm, wanted) for perm, wanted in zip(found.permutations, perms[1:], strict=True))
