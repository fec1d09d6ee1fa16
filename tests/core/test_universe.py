"""The agreement in the universe: value, gradient, and the exact course along a step."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.starts import soften, start_point
from c2m3_fl.core.universe import Universe
from tests.core.networks import ALL, at_matrices, autograd, draws, matrices_at, mlp, pairwise_agreement

WEIGHTS = [0.5, 0.2, 0.3]
BLOCKS = [range(1), range(1, 2), range(1, 3), range(3)]
each_block = pytest.mark.parametrize("block", BLOCKS, ids=["first", "second", "last two", "all"])
each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())


def make(spec, dtype=torch.float64, count=3):
    nodes = draws(spec, count, seed=1, dtype=dtype)
    return nodes, Problem.of(spec, nodes, torch.tensor(WEIGHTS[:count], dtype=torch.float64))


def random_perms(spec, count=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [permutation.random(spec, generator) for _ in range(count)]


def noise(problem, seed=3):
    places = start_point(problem, "sinkhorn", torch.Generator().manual_seed(seed)).places
    return {name: torch.stack([places[i][name] for i in range(3)]) for name in problem.spec.groups}


def at_perms(problem, perms):
    return Universe(problem, start_point(problem, perms, None))


def towards(point, perms, block, step_size):
    """The point with a block of nodes moved towards permutations."""
    moved = {name: matrices.clone() for name, matrices in point.items()}
    for name, matrices in moved.items():
        for i in block:
            corner = torch.eye(matrices.shape[1]).to(matrices)[perms[i][name]]
            matrices[i] = (1 - step_size) * matrices[i] + step_size * corner
    return moved


def vertex_of(perms, block):
    return {name: torch.stack([perms[i][name] for i in block]) for name in perms[0]}


@each_spec
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_objective_is_the_sum_over_pairs(spec, dtype, tolerance):
    nodes, problem = make(spec, dtype)
    perms = random_perms(spec)
    value = at_perms(problem, perms).objective
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
    value = at_perms(problem, here).objective
    size = sum(0.01 * float(v.double().square().sum()) for node in nodes for v in node.values())
    assert abs(value - pairwise_agreement(spec, nodes, here, [0.1] * 10)) <= 1e-6 * size


@each_spec
@each_block
def test_the_gradient_is_that_of_autograd(spec, block):
    _, problem = make(spec)
    point = noise(problem)
    expected = autograd(problem, point)
    shares = problem.weights[block.start : block.stop, None, None]
    for name, found in at_matrices(problem, point).gradient(block).items():
        rows = expected[name][block.start : block.stop]
        torch.testing.assert_close(shares * found, rows, rtol=1e-12, atol=1e-12)


@each_spec
def test_the_gradient_in_another_frame_is_the_gradient_in_its_order(spec):
    _, problem = make(spec)
    perms = random_perms(spec)
    universe = at_perms(problem, perms)
    expected = autograd(Problem.of(spec, make(spec)[0], problem.weights), matrices_at(universe))
    for name, found in universe.gradient(range(3)).items():
        for i, share in enumerate(WEIGHTS):
            torch.testing.assert_close(share * found[i], expected[name][i][:, perms[i][name]], rtol=1e-12, atol=1e-12)


@each_spec
def test_the_universe_is_the_action_of_the_permutations(spec):
    nodes, problem = make(spec)
    for seed in (2, 3):  # one after the other: the second from where the first one left the nodes
        perms = random_perms(spec, seed=seed)
        at_perms(problem, perms)
        there = [permutation.apply(spec, perm, node) for perm, node in zip(perms, nodes, strict=True)]
        for term, expected in zip(problem.terms, Problem.of(spec, there, problem.weights).terms, strict=True):
            assert torch.equal(term.value, expected.value)


@each_spec
@each_block
@pytest.mark.parametrize("step_size", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("soft", [True, False], ids=["from matrices", "from permutations"])
def test_the_course_is_the_segment_between_point_and_vertex(spec, block, step_size, soft):
    _, problem = make(spec)
    start, perms = random_perms(spec, seed=4), random_perms(spec)
    moved = at_matrices(problem, noise(problem)) if soft else at_perms(problem, start)
    before, point = moved.objective, matrices_at(moved)
    frames = [problem.frame(i) for i in range(3)]
    relative = [{name: torch.argsort(frames[i][name])[perms[i][name]] for name in perms[i]} for i in range(3)]
    vertex = vertex_of(relative, block)
    course = moved.course(block, moved.gradient(block), vertex)
    moved.advance(block, vertex, step_size)
    expected = at_matrices(make(spec)[1], towards(point, perms, block, step_size))
    for left, right in zip(moved.means, expected.means, strict=True):
        torch.testing.assert_close(left, right)
    for number in range(len(problem.terms)):
        for i in range(3):
            here, there = (each.node(each.problem.terms[number], i) for each in (moved, expected))
            torch.testing.assert_close(here, there)
    for name, matrices in matrices_at(moved).items():
        torch.testing.assert_close(matrices, matrices_at(expected)[name], rtol=0, atol=1e-14)
    gained = sum(c * step_size**power for power, c in enumerate(course)) - course[0]
    assert before + gained == pytest.approx(expected.objective, rel=1e-12)


@each_spec
def test_many_short_steps_end_where_the_matrices_do(spec):
    """Mixtures of a few permutations become matrices."""
    _, problem = make(spec)
    universe = at_perms(problem, [permutation.identity(spec)] * 3)
    point = matrices_at(universe)
    for seed in range(6):
        perms = random_perms(spec, seed=seed)
        point = towards(point, perms, range(1, 2), 0.3)
        universe.advance(range(1, 2), vertex_of(perms, range(1, 2)), 0.3)
        for name, matrices in matrices_at(universe).items():
            torch.testing.assert_close(matrices, point[name], rtol=0, atol=1e-14)
    assert universe.add_up() == pytest.approx(at_matrices(make(spec)[1], point).objective, rel=1e-12)


@each_spec
def test_a_warm_point_is_on_the_way_to_the_barycentre(spec):
    _, problem = make(spec)
    perms = random_perms(spec)
    point = matrices_at(at_perms(problem, perms))
    expected = {name: 0.4 * matrices + 0.6 / matrices.shape[1] for name, matrices in point.items()}
    universe = Universe(problem, soften(problem, perms, 0.6))
    for name, matrices in matrices_at(universe).items():
        torch.testing.assert_close(matrices, expected[name], rtol=0, atol=1e-14)
    assert universe.objective == pytest.approx(at_matrices(make(spec)[1], expected).objective, rel=1e-12)
    for name, slope in autograd(make(spec)[1], expected).items():
        found = universe.gradient(range(3))[name]
        for i, share in enumerate(WEIGHTS):
            torch.testing.assert_close(share * found[i], slope[i][:, perms[i][name]], rtol=1e-12, atol=1e-12)


@each_spec
@each_block
def test_the_slope_at_the_start_is_the_gradient_towards_the_vertex(spec, block):
    _, problem = make(spec)
    point, perms = noise(problem), random_perms(spec)
    corner = towards(point, perms, block, 1.0)
    universe = at_matrices(problem, point)
    gradient = universe.gradient(block)
    course = universe.course(block, gradient, vertex_of(perms, block))
    rows = slice(block.start, block.stop)
    shares = problem.weights[rows, None, None]
    slope = sum(float((shares * gradient[name] * (corner[name] - point[name])[rows]).sum()) for name in point)
    assert course[1] == pytest.approx(slope, rel=1e-10)


@each_spec
@each_block
def test_the_exact_step_is_at_least_as_good_as_any_grid(spec, block):
    _, problem = make(spec)
    for seed in range(3):
        point, perms = noise(problem, seed), random_perms(spec, seed=seed)
        universe = at_matrices(problem, point)
        course = universe.course(block, universe.gradient(block), vertex_of(perms, block))
        before, gained = universe.objective, best_step(course)[1] - course[0]
        grid = [towards(point, perms, block, t) for t in torch.linspace(0, 1, 41).tolist()]
        values = [at_matrices(problem, here).objective for here in grid]
        assert before + gained >= max(values) - 1e-12 * abs(max(values))
        assert values[0] == pytest.approx(before, rel=1e-12)


def test_a_step_of_one_family_reads_and_moves_its_own_terms_alone():
    """Looking at all terms for every family is quadratic work in a deep network."""
    spec = mlp(3, *[4] * 30, 2)
    _, problem = make(spec)
    universe = at_perms(problem, random_perms(spec))
    reversal = torch.arange(4).flip(0)
    assert problem.touched(["h7"]) == [n for n, term in enumerate(problem.terms) if "h7" in term.groups]
    before = [(term.value.clone(), mean.clone()) for term, mean in zip(problem.terms, universe.means, strict=True)]
    universe.settle(1, {"h7": reversal})
    for number, (value, mean) in enumerate(before):
        same = torch.equal(value, problem.terms[number].value) and torch.equal(mean, universe.means[number])
        assert same != (number in problem.touched(["h7"]))
