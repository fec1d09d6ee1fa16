"""Gradients that are kept from visit to visit are those that are computed anew."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import gradients, permutation
from c2m3_fl.core.gradients import Gradients
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.starts import soften, start_point
from c2m3_fl.core.universe import Universe
from tests.core.networks import ALL, draws, mlp

SPECS = {**ALL, "wide": mlp(6, 12, 11, 13, 4)}  # of four units or less every move is one of half of them
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
NODES = 4


@pytest.fixture
def everything_is_kept(monkeypatch):
    """Also gradients of small groups, however many units move."""
    for name, value in (("_CALL", 0), ("_LARGE", 0), ("_WORTH", 1e9), ("_MODELS", 1e9)):
        monkeypatch.setattr(gradients, name, value)


def universe_of(spec, dtype=torch.float64, soft=0.0):
    nodes = draws(spec, NODES, seed=1, dtype=dtype)
    problem = Problem.of(spec, nodes, torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64))
    if soft:
        return Universe(problem, soften(problem, [permutation.identity(spec)] * NODES, soft))
    return Universe(problem, start_point(problem, "identity", None))


def few(spec, family, generator, most):
    """A permutation of a family that moves up to `most` of its units."""
    whole = permutation.random(spec, generator)
    index = {name: torch.arange(spec.groups[name].size) for name in family}
    root = family[0]
    size = spec.groups[root].size
    chosen = torch.randperm(size, generator=generator)[: max(2, int(most * size))].sort().values
    index[root][chosen] = chosen.roll(1)
    for name in family[1:]:  # blocks move with their parent; inside them the units stay
        block = spec.groups[name].size // size
        index[name] = (index[root][:, None] * block + torch.arange(block)).reshape(-1)
    return whole if most > 1 else index


@each_spec
@pytest.mark.usefixtures("everything_is_kept")
def test_kept_gradients_are_those_computed_anew(spec):
    universe = universe_of(spec)
    kept, generator = Gradients(universe), torch.Generator().manual_seed(0)
    families = [(root, *spec.children(root)) for root in spec.roots]
    moves = [(node, family) for _ in range(4) for node in range(NODES) for family in families]
    for step, (node, family) in enumerate(moves):
        found = kept.of(node, family, universe.problem.touched(family))
        expected = universe.gradient(range(node, node + 1))
        for name in family:
            torch.testing.assert_close(found[name], expected[name][0], rtol=1e-11, atol=1e-11)
        index = few(spec, family, generator, 2.0 if step == 2 * NODES * len(families) else 0.3)
        kept.settle(node, {name: index[name] for name in family})


@each_spec
@pytest.mark.usefixtures("everything_is_kept")
def test_moves_of_few_units_leave_the_sums_and_the_agreement_exact(spec):
    universe, generator = universe_of(spec), torch.Generator().manual_seed(0)
    families = [(root, *spec.children(root)) for root in spec.roots]
    for step in range(20):
        family = families[step % len(families)]
        index = few(spec, family, generator, 0.3)
        universe.settle(
            step % NODES, {name: index[name] for name in family}, followed=range(len(universe.problem.terms))
        )
        quick = universe.add_up(anew=False)
    slow = universe.add_up()
    size = universe.problem.scale + abs(slow)
    assert abs(quick - slow) <= 1e-12 * size
    nodes = draws(spec, NODES, seed=1)
    there = [permutation.apply(spec, universe.problem.frame(i), nodes[i]) for i in range(NODES)]
    for term, expected in zip(
        universe.problem.terms, Problem.of(spec, there, universe.problem.weights).terms, strict=True
    ):
        assert torch.equal(term.value, expected.value)


@pytest.mark.usefixtures("everything_is_kept")
def test_a_node_between_permutations_is_not_kept():
    spec = mlp(6, 9, 8, 4)
    universe = universe_of(spec, soft=0.4)
    kept = Gradients(universe)
    for node in (0, 1, 0):
        found = kept.of(node, ["h0"], universe.problem.touched(["h0"]))
        expected = universe.gradient(range(node, node + 1))["h0"][0]
        torch.testing.assert_close(found["h0"], expected, rtol=1e-11, atol=1e-11)
        kept.settle(node, {"h0": few(spec, ("h0",), torch.Generator().manual_seed(node), 0.3)["h0"]})


def test_where_few_units_move_products_shrink(monkeypatch):
    # Layers of 64 units; node 1 swaps two of them back and forth. The numbers that products of node 0's gradient see.
    spec = mlp(40, 64, 64, 10)
    universe = universe_of(spec)
    work = []
    contract = gradients.contract
    monkeypatch.setattr(gradients, "_CALL", 0)
    monkeypatch.setattr(gradients, "_LARGE", 0)
    monkeypatch.setattr(gradients, "_MODELS", 1e9)
    monkeypatch.setattr(gradients, "contract", lambda left, *rest: work.append(left.numel()) or contract(left, *rest))
    slope = Universe.slope
    whole = []
    monkeypatch.setattr(Universe, "slope", lambda *args: whole.append(1) or slope(*args))
    kept, swap = Gradients(universe), torch.arange(64)
    swap[:2] = torch.tensor([1, 0])
    touched = universe.problem.touched(["h0"])
    kept.of(0, ["h0"], touched)
    assert len(whole) == len(touched)
    for _ in range(5):
        kept.settle(1, {"h1": swap})
        kept.of(0, ["h0"], touched)
    assert len(whole) == len(touched)
    assert work == [2 * 64] * 5
