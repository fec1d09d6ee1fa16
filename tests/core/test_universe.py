"""The agreement in the universe: value, gradient, and the exact course along a step."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.mapped import Mapped
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.terms import Term
from c2m3_fl.core.universe import Universe
from tests.core.networks import ALL, draws, mlp, pairwise_agreement

WEIGHTS = [0.5, 0.2, 0.3]
WHOLE = slice(0, 3)
BLOCKS = [slice(0, 1), slice(1, 2), slice(1, 3), WHOLE]
each_block = pytest.mark.parametrize("block", BLOCKS, ids=["first", "second", "last two", "all"])
each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def make(spec, dtype=torch.float64, count=3):
    nodes = draws(spec, count, seed=1, dtype=dtype)
    return nodes, Problem.of(spec, nodes, torch.tensor(WEIGHTS[:count], dtype=torch.float64))


def stacked(perms):
    return {name: torch.stack([perm[name] for perm in perms]) for name in perms[0]}


def random_perms(spec, count=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [permutation.random(spec, generator) for _ in range(count)]


def at_point(problem, point):
    return Universe(problem, {name: matrices.clone() for name, matrices in point.items()})


def at_perms(problem, perms):
    return at_point(problem, start_point(problem, perms, None))


def course_of(problem, point, block, vertex):
    universe = at_point(problem, point)
    return universe.course(block, universe.others(block), vertex)


def towards(point, corner, block, step_size):
    """The point with a block of nodes moved towards a corner."""
    moved = {name: matrices.clone() for name, matrices in point.items()}
    for name, matrices in moved.items():
        matrices[block] = (1 - step_size) * matrices[block] + step_size * corner[name][block]
    return moved


@each_spec
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_objective_is_the_sum_over_pairs(spec, dtype, tolerance):
    nodes, problem = make(spec, dtype)
    perms = random_perms(spec)
    value = at_perms(problem, perms).objective()
    names = [name for name, tensor in spec.tensors.items() if not tensor.buffer]
    size = sum(
        w**2 * float(node[n].double().square().sum()) for w, node in zip(WEIGHTS, nodes, strict=True) for n in names
    )
    assert abs(value - pairwise_agreement(spec, nodes, perms, WEIGHTS)) <= tolerance * size


def test_the_objective_keeps_its_precision_at_ten_wide_nodes():
    # Float32 sums of squares were off by 3e-5 here; they are accumulated in float64.
    spec = mlp(784, 256, 256, 10)
    nodes = draws(spec, 10, dtype=torch.float32)
    shared = draws(spec, 1, seed=9, dtype=torch.float32)[0]
    nodes = [{name: shared[name] + 0.1 * value for name, value in node.items()} for node in nodes]
    problem = Problem.of(spec, nodes, torch.full((10,), 0.1, dtype=torch.float64))
    here = [permutation.identity(spec)] * 10
    value = at_perms(problem, here).objective()
    size = sum(0.01 * float(v.double().square().sum()) for node in nodes for v in node.values())
    assert abs(value - pairwise_agreement(spec, nodes, here, [0.1] * 10)) <= 1e-6 * size


@each_spec
@each_block
def test_the_gradient_is_that_of_autograd(spec, block):
    _, problem = make(spec)
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(3))
    leaves = {name: matrices.clone().requires_grad_() for name, matrices in point.items()}
    total = torch.zeros((), dtype=torch.float64)
    for mapped in [Mapped(term, leaves) for term in problem.terms]:
        mean = torch.einsum("n,n...->...", problem.weights, mapped.universe)
        own = torch.einsum("n,n...->", problem.weights.square(), mapped.universe.square())
        total = total + 0.5 * (mean.square().sum() - own)
    total.backward()
    universe = at_point(problem, point)
    for name, found in universe.gradient(block, universe.others(block)).items():
        expected = leaves[name].grad if leaves[name].grad is not None else torch.zeros_like(point[name])
        torch.testing.assert_close(problem.weights[block, None, None] * found, expected[block], rtol=1e-12, atol=1e-12)


@each_spec
def test_mapped_tensors_at_matrices_and_at_permutations_agree(spec):
    _, problem = make(spec)
    perms = random_perms(spec)
    nearly = {name: 0.5 * matrices for name, matrices in start_point(problem, perms, None).items()}  # no permutations
    for hard, soft in zip(at_perms(problem, perms).mapped, at_point(problem, nearly).mapped, strict=True):
        for mask, (left, right) in enumerate(zip(hard.maps, soft.maps, strict=True)):
            torch.testing.assert_close(0.5 ** mask.bit_count() * left, right)


@each_spec
def test_the_universe_is_the_action_of_the_permutations(spec):
    nodes, problem = make(spec)
    perms = random_perms(spec)
    moved = [permutation.apply(spec, perm, node) for perm, node in zip(perms, nodes, strict=True)]
    there = Problem.of(spec, moved, problem.weights)
    for mapped, expected in zip(at_perms(problem, perms).mapped, there.terms, strict=True):
        assert torch.equal(mapped.universe, expected.value)


@each_spec
@each_block
@pytest.mark.parametrize("step_size", [0.0, 0.3, 1.0])
def test_the_course_is_the_segment_between_point_and_vertex(spec, block, step_size):
    _, problem = make(spec)
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(3))
    perms = random_perms(spec)
    expected = at_point(problem, towards(point, start_point(problem, perms, None), block, step_size))
    moved, vertex = at_point(problem, point), stacked(perms[block])
    others, before = moved.others(block), moved.objective()
    course = moved.course(block, others, vertex)
    moved.advance(block, others, vertex, step_size)
    for left, right in zip(moved.mapped, expected.mapped, strict=True):
        for one, other in zip(left.maps, right.maps, strict=True):
            torch.testing.assert_close(one, other)
    for left, right in zip(moved.means, expected.means, strict=True):
        torch.testing.assert_close(left, right)
    for name, matrices in moved.point.items():
        torch.testing.assert_close(matrices, expected.point[name], rtol=0, atol=1e-14)
    gained = sum(c * step_size**power for power, c in enumerate(course)) - course[0]
    assert before + gained == pytest.approx(expected.objective(), rel=1e-12)


@each_spec
@each_block
def test_the_slope_at_the_start_is_the_gradient_towards_the_vertex(spec, block):
    _, problem = make(spec)
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(3))
    perms = random_perms(spec)
    corner = start_point(problem, perms, None)
    course = course_of(problem, point, block, stacked(perms[block]))
    universe = at_point(problem, point)
    gradient = universe.gradient(block, universe.others(block))
    shares = problem.weights[block, None, None]
    slope = sum(float((shares * gradient[name] * (corner[name] - point[name])[block]).sum()) for name in point)
    assert course[1] == pytest.approx(slope, rel=1e-10)


@each_spec
@each_block
def test_the_exact_step_is_at_least_as_good_as_any_grid(spec, block):
    _, problem = make(spec)
    for seed in range(3):
        point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(seed))
        perms = random_perms(spec, seed=seed)
        corner = start_point(problem, perms, None)
        course = course_of(problem, point, block, stacked(perms[block]))
        gained = best_step(course)[1] - course[0]
        grid = [towards(point, corner, block, t) for t in torch.linspace(0, 1, 41).tolist()]
        values = [at_point(problem, here).objective() for here in grid]
        assert values[0] + gained >= max(values) - 1e-12 * abs(max(values))


def test_a_term_reads_the_permutations_of_its_own_groups_alone():
    """A vertex has an entry for every group of the network: cutting all of them for every term is quadratic work."""
    term = Mapped(Term(("a", "b"), torch.randn(2, 3, 1, 4)))
    term.own()
    vertex = {"a": torch.stack([torch.randperm(3)] * 2), "b": torch.stack([torch.randperm(4)] * 2), "elsewhere": None}
    term.course(slice(0, 2), vertex, torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(3, 1, 4))
    term.advance(slice(0, 2), vertex, 0.5)
