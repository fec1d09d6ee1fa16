"""Reheating: what starting again from a softened end must keep, and what it is for."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation, search
from c2m3_fl.core.match import match
from tests.core.networks import ALL, draws, mlp, planted

each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def cold(monkeypatch, spec, nodes, **options):
    """A match that does not reheat."""
    with monkeypatch.context() as patch:
        patch.setattr("c2m3_fl.core.search.WARMTHS", ())
        return match(spec, nodes, **options)


@each_spec
def test_reheating_loses_nothing_and_keeps_the_course_before_it(spec, monkeypatch):
    for seed in range(3):
        nodes = draws(spec, 5, seed=seed)
        starts = [permutation.random(spec, torch.Generator().manual_seed(i)) for i in range(5)]
        for start in ("auto", starts):
            before, after = cold(monkeypatch, spec, nodes, start=start), match(spec, nodes, start=start)
            course = before.objectives
            assert after.objectives[: len(course)] == course
            gains = torch.tensor(after.objectives[len(course) - 1 :], dtype=torch.float64).diff()
            assert bool((gains > 0).all())
            assert after.steps == before.steps


def test_reheating_leaves_local_optima(monkeypatch):
    # No law. Five copies under noise of twice their size, seeds 0 to 9; with less of it there is little left to gain.
    spec, better = mlp(12, 24, 24, 6), 0
    for seed in range(10):
        nodes, _ = planted(spec, 5, 2.0, seed)
        better += match(spec, nodes).objectives[-1] > cold(monkeypatch, spec, nodes).objectives[-1]
    assert better >= 8


def test_a_start_that_no_step_improves_is_not_reheated(monkeypatch):
    spec = mlp(12, 24, 24, 6)
    nodes, perms = planted(spec, 5, 0.05, seed=0)
    monkeypatch.setattr("c2m3_fl.core.search.soften", lambda *_: pytest.fail("reheated"))
    found = match(spec, nodes, start=perms)
    assert found.steps == 0
    for perm, wanted in zip(found.permutations, perms, strict=True):
        assert all(torch.equal(perm[name], wanted[name]) for name in spec.groups)


@pytest.mark.parametrize("noise", [0.1, 0.35])
def test_nodes_that_are_alike_are_not_reheated_and_lose_nothing(noise, monkeypatch):
    """Copies of one network that have drifted: their order is found by the first ascent."""
    spec = mlp(12, 24, 24, 6)
    nodes, maps = planted(spec, 5, noise, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(search, "ALIKE", 2.0)
        warm = match(spec, nodes)
    monkeypatch.setattr(search, "reheat", lambda *_: pytest.fail("reheated"))
    found = match(spec, nodes)
    assert found.objectives == warm.objectives
    for i, wanted in enumerate(maps):
        assert permutation.is_identity(
            permutation.compose(found.between(0, i), permutation.invert(permutation.between(maps[0], wanted)))
        )


def test_reheatings_of_many_nodes_cost_what_those_of_few_cost(monkeypatch):
    # the first ascent's work of twelve nodes in all: three with 5 nodes, two with 7, one with 10, none with 16
    spec, seen = mlp(12, 24, 24, 6), []
    soften = search.soften
    monkeypatch.setattr(search, "soften", lambda *args: seen.append(1) or soften(*args))
    counts = []
    for count in (5, 7, 10, 16):
        seen.clear()
        match(spec, planted(spec, count, 2.0, seed=0)[0])
        counts.append(len(seen))
    assert counts == [3, 2, 1, 0]
