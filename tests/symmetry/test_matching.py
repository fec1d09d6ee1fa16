"""Every kind of group that tracing finds is matched by the same laws: the core's, on the spec of every family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.terms import compile_terms
from c2m3_fl.core.universe import Universe
from tests.core.networks import at_matrices, autograd, pairwise_agreement
from tests.symmetry.families import SMALL, build, traced

WEIGHTS = [0.5, 0.2, 0.3]
WHOLE = range(3)
each_family = pytest.mark.parametrize("family", SMALL)


def three(family: str) -> tuple[PermutationSpec, list[Params], Problem]:
    """Three networks of one family from different seeds, in float64, and the problem of matching them."""
    nodes = [dict(build(family, seed).double().state_dict()) for seed in range(3)]
    nodes = [{name: value for name, value in node.items() if isinstance(value, Tensor)} for node in nodes]
    spec = traced(family).spec
    return spec, nodes, Problem.of(spec, nodes, torch.tensor(WEIGHTS, dtype=torch.float64))


def drawn(spec: PermutationSpec, seed: int) -> list[Permutation]:
    generator = torch.Generator().manual_seed(seed)
    return [permutation.random(spec, generator) for _ in WEIGHTS]


def noise(problem: Problem, seed: int) -> dict[str, Tensor]:
    """Doubly stochastic matrices for all nodes."""
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(seed))
    places: Mapping[int, Mapping[str, Any]] = point.places
    return {name: torch.stack([places[i][name] for i in range(problem.count)]) for name in problem.spec.groups}


@pytest.mark.slow
@each_family
def test_the_objective_is_the_agreement_of_the_permuted_networks(family: str) -> None:
    spec, nodes, problem = three(family)
    for seed in range(3):
        perms = drawn(spec, seed)
        found = Universe(problem, start_point(problem, perms, None)).objective
        assert found == pytest.approx(pairwise_agreement(spec, nodes, perms, WEIGHTS), rel=1e-9, abs=1e-9)


@each_family
def test_the_gradient_is_that_of_autograd(family: str) -> None:
    _, _, problem = three(family)
    point = noise(problem, 1)
    expected = autograd(problem, point)
    for name, found in at_matrices(problem, point).gradient(WHOLE).items():
        torch.testing.assert_close(problem.weights[:, None, None] * found, expected[name])


@each_family
@pytest.mark.parametrize("block", [range(1, 2), WHOLE], ids=["one node", "all nodes"])
def test_the_exact_step_is_at_least_as_good_as_any_grid(family: str, block: range) -> None:
    spec, _, problem = three(family)
    point, perms = noise(problem, 2), drawn(spec, 3)
    vertex = {name: torch.stack([perms[i][name] for i in block]) for name in spec.groups}
    universe = at_matrices(problem, point)
    before = universe.objective
    coefficients = universe.course(block, universe.gradient(block), vertex)
    step_size, gained = best_step(coefficients)
    for t in torch.linspace(0, 1, 11).tolist():
        between = {name: matrices.clone() for name, matrices in point.items()}
        for name, matrices in between.items():
            matrices[block.start : block.stop] *= 1 - t
            for i in block:
                matrices[i] += t * torch.eye(matrices.shape[1]).to(matrices)[perms[i][name]]
        here, there = at_matrices(problem, between).objective, sum(c * t**k for k, c in enumerate(coefficients))
        assert here - before == pytest.approx(there - coefficients[0], rel=1e-9, abs=1e-9)
        assert gained >= there - 1e-9 * abs(here)
    universe = at_matrices(problem, point)
    universe.advance(block, vertex, step_size)
    assert universe.add_up() == pytest.approx(before + gained - coefficients[0], rel=1e-9)


@each_family
@pytest.mark.parametrize("start", ["auto", "barycentre"])
def test_the_search_climbs_to_permutations_that_no_block_improves(family: str, start: str) -> None:
    spec, nodes, _ = three(family)
    found = match(spec, nodes, weights=WEIGHTS, start=start)
    for perm in found.permutations:
        permutation.validate(spec, perm)
    climbed = torch.tensor(found.objectives, dtype=torch.float64).diff() >= -1e-12 * abs(found.objectives[-1])
    assert bool(climbed[: found.steps].all())
    assert bool(climbed[found.steps + 2 :].all())  # between them lies the way from a soft point to permutations
    reached = pairwise_agreement(spec, nodes, found.permutations, WEIGHTS)
    assert found.objectives[-1] == pytest.approx(reached, rel=1e-9)
    again = match(spec, nodes, weights=WEIGHTS, start=found.permutations, max_steps=0)
    assert again.objectives[-1] == pytest.approx(reached, rel=1e-4)


@each_family
def test_permuting_all_nodes_alike_permutes_their_mean(family: str) -> None:
    spec, nodes, _ = three(family)
    (perm, *_) = drawn(spec, 4)
    moved = weighted_mean([permutation.apply(spec, perm, node) for node in nodes], WEIGHTS)
    mean = permutation.apply(spec, perm, weighted_mean(nodes, WEIGHTS))
    for name, value in mean.items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-12)
    back = permutation.apply(spec, permutation.invert(perm), permutation.apply(spec, perm, nodes[0]))
    assert all(torch.equal(back[name], value) for name, value in nodes[0].items())


@each_family
def test_terms_hold_every_number_once(family: str) -> None:
    """What the objective sums over is all of the matched parameters, cut along their segments."""
    spec, nodes, _ = three(family)
    names = [name for name, tensor in spec.tensors.items() if not tensor.buffer and nodes[0][name].is_floating_point()]
    terms = compile_terms(spec, nodes[:1])
    for power in (1, 2):
        whole = sum(float((nodes[0][name] ** power).sum()) for name in names)
        assert sum(float((term.value**power).sum()) for term in terms) == pytest.approx(whole, rel=1e-9)
