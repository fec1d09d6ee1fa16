"""The agreement in the universe: value, gradient, and the exact course along a step."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.line_search import added, best_step, power_basis
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Images
from tests.core.networks import ALL, draws, mlp, pairwise_agreement

WEIGHTS = [0.5, 0.2, 0.3]
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
    return [Images(term, point) for term in problem.terms]


def at_perms(problem, perms):
    return at_point(problem, start_point(problem, perms, None))


def polynomial_of(problem, point, vertex):
    images = at_point(problem, point)
    return added([power_basis(image.agreement_along(vertex, problem.weights)) for image in images])


@each_spec
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_objective_is_the_sum_over_pairs(spec, dtype, tolerance):
    nodes, problem = make(spec, dtype)
    perms = random_perms(spec)
    value = problem.objective(at_perms(problem, perms))
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
    value = problem.objective(at_perms(problem, here))
    size = sum(0.01 * float(v.double().square().sum()) for node in nodes for v in node.values())
    assert abs(value - pairwise_agreement(spec, nodes, here, [0.1] * 10)) <= 1e-6 * size


@each_spec
def test_the_gradient_is_that_of_autograd(spec):
    _, problem = make(spec)
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(3))
    leaves = {name: matrices.clone().requires_grad_() for name, matrices in point.items()}
    total = torch.zeros((), dtype=torch.float64)
    for images in at_point(problem, leaves):
        mean = torch.einsum("n,n...->...", problem.weights, images.universe)
        own = torch.einsum("n,n...->", problem.weights.square(), images.universe.square())
        total = total + 0.5 * (mean.square().sum() - own)
    total.backward()
    for name, found in problem.gradient(at_point(problem, point)).items():
        expected = leaves[name].grad if leaves[name].grad is not None else torch.zeros_like(point[name])
        torch.testing.assert_close(problem.weights[:, None, None] * found, expected, rtol=1e-12, atol=1e-12)


@each_spec
def test_images_at_matrices_and_at_permutations_agree(spec):
    _, problem = make(spec)
    perms = random_perms(spec)
    nearly = {name: 0.5 * matrices for name, matrices in start_point(problem, perms, None).items()}  # no permutations
    for hard, soft in zip(at_perms(problem, perms), at_point(problem, nearly), strict=True):
        for mask, (left, right) in enumerate(zip(hard.maps, soft.maps, strict=True)):
            torch.testing.assert_close(0.5 ** mask.bit_count() * left, right)


@each_spec
def test_the_universe_is_the_action_of_the_permutations(spec):
    nodes, problem = make(spec)
    perms = random_perms(spec)
    moved = [permutation.apply(spec, perm, node) for perm, node in zip(perms, nodes, strict=True)]
    there = Problem.of(spec, moved, problem.weights)
    for images, expected in zip(at_perms(problem, perms), there.terms, strict=True):
        assert torch.equal(images.universe, expected.value)


@each_spec
@pytest.mark.parametrize("step_size", [0.0, 0.3, 1.0])
def test_the_course_is_the_segment_between_point_and_vertex(spec, step_size):
    _, problem = make(spec)
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(3))
    perms = random_perms(spec)
    corner = start_point(problem, perms, None)
    between = {name: (1 - step_size) * point[name] + step_size * corner[name] for name in point}
    polynomial = polynomial_of(problem, point, stacked(perms))
    moved = at_point(problem, point)
    for images, expected in zip(moved, at_point(problem, between), strict=True):
        images.advance(stacked(perms), step_size)
        for left, right in zip(images.maps, expected.maps, strict=True):
            torch.testing.assert_close(left, right)
    value = sum(c * step_size**power for power, c in enumerate(polynomial))
    assert value + problem.constant == pytest.approx(problem.objective(at_point(problem, between)), rel=1e-12)


@each_spec
def test_the_slope_at_the_start_is_the_gradient_towards_the_vertex(spec):
    _, problem = make(spec)
    point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(3))
    perms = random_perms(spec)
    corner = start_point(problem, perms, None)
    polynomial = polynomial_of(problem, point, stacked(perms))
    gradient = problem.gradient(at_point(problem, point))
    slope = sum(
        float((problem.weights[:, None, None] * gradient[name] * (corner[name] - point[name])).sum()) for name in point
    )
    assert polynomial[1] == pytest.approx(slope, rel=1e-10)


@each_spec
def test_the_exact_step_is_at_least_as_good_as_any_grid(spec):
    _, problem = make(spec)
    for seed in range(5):
        point = start_point(problem, "sinkhorn", torch.Generator().manual_seed(seed))
        corner = random_perms(spec, seed=seed)
        _, value = best_step(polynomial_of(problem, point, stacked(corner)))
        corner = start_point(problem, corner, None)
        between = [{name: (1 - t) * point[name] + t * corner[name] for name in point} for t in torch.linspace(0, 1, 41)]
        best = max(problem.objective(at_point(problem, here)) for here in between)
        assert value + problem.constant >= best - 1e-12 * abs(best)
