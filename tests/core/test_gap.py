"""The duality gap of a match is that of its permutations, whatever the search met on its way there."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from c2m3_fl.core import permutation
from c2m3_fl.core.joining import join
from c2m3_fl.core.match import match
from c2m3_fl.core.problem import Problem
from tests.core.networks import ALL, autograd, draws, mlp, planted

each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())
LINEAR = ("mlp", "convolutional", "grouped", "bilinear")  # no tensor carries a family on two axes
TWICE = ("recurrent", "concatenated", "attention")


def best(gains, spec, root):
    """The largest worth of a family's permutations, by scipy's solver and all orders of the parent's blocks."""
    children = spec.children(root)
    if not children:
        rows, columns = linear_sum_assignment(gains[root], maximize=True)
        return float(gains[root][rows, columns].sum())
    blocks, values = spec.groups[root].size, []
    for outer in permutations(range(blocks)):
        value = sum(float(gains[root][h, k]) for h, k in enumerate(outer))
        for name in children:
            size = spec.groups[name].size // blocks
            for h, k in enumerate(outer):
                part = gains[name][h * size : (h + 1) * size, k * size : (k + 1) * size]
                rows, columns = linear_sum_assignment(part, maximize=True)
                value += float(part[rows, columns].sum())
        values.append(value)
    return max(values)


def independent_gap(spec, nodes, perms, weights, frozen=0):
    """``max_S <gradient, S - P>`` from autograd's gradient, relative to ``sum_{i<j} w_i w_j |W_i| |W_j|``."""
    problem = Problem.of(spec, nodes, torch.tensor(weights, dtype=torch.float64))
    point = {
        name: torch.stack([torch.eye(group.size, dtype=torch.float64)[perm[name]] for perm in perms])
        for name, group in spec.groups.items()
    }
    gradient, gap = autograd(problem, point), 0.0
    for i in range(frozen, len(nodes)):
        gap += sum(
            best({name: slope[i].numpy() for name, slope in gradient.items()}, spec, root) for root in spec.roots
        )
        gap -= sum(float((slope[i] * point[name][i]).sum()) for name, slope in gradient.items())
    norms = [sum(float(term.value[i].square().sum()) for term in problem.terms) ** 0.5 for i in range(len(nodes))]
    pulls = [weight * norm for weight, norm in zip(weights, norms, strict=True)]
    scale = sum(pulls[i] * pulls[j] for i in range(len(nodes)) for j in range(i))
    return gap / scale


@each_spec
@pytest.mark.parametrize("start", ["auto", "random"])
@pytest.mark.parametrize("options", [{}, {"polish": False, "max_steps": 1}], ids=["to the end", "cut short"])
def test_the_gap_is_that_of_the_permutations(spec, start, options):
    nodes, weights = draws(spec, 4, seed=11), [0.4, 0.3, 0.2, 0.1]
    found = match(spec, nodes, weights=weights, start=start, **options)
    expected = independent_gap(spec, nodes, found.permutations, weights)
    assert found.gap == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.converged == (found.gap <= 1e-4)


def test_the_gap_of_joining_nodes_leaves_the_universe_where_it_is():
    spec = ALL["recurrent"]
    universe, *nodes = draws(spec, 3, seed=4)
    joined = join(spec, universe, nodes, universe_weight=2.0, polish=False, max_steps=0, start="random")
    perms = [permutation.identity(spec), *joined.permutations]
    expected = independent_gap(spec, [universe, *nodes], perms, [0.5, 0.25, 0.25], frozen=1)
    assert joined.gap == pytest.approx(expected, rel=1e-9)
    assert joined.gap > 0


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("count", [3, 5])
def test_no_gap_is_left_where_no_tensor_carries_a_family_twice(name, count):
    for seed in range(5):
        found = match(ALL[name], draws(ALL[name], count, seed=seed))
        assert found.gap <= 1e-12
        assert found.converged


def test_a_gap_that_is_left_where_a_tensor_carries_a_family_twice_is_told():
    # No law: seeds 0 to 5 of three specs, some of which end with a gap although no single family can improve.
    found = [match(ALL[name], draws(ALL[name], 3, seed=seed)) for name in TWICE for seed in range(6)]
    left = [each for each in found if each.gap > 1e-4]
    assert left
    assert not any(each.converged for each in left)
    assert "(not converged)" in str(left[0])


def test_a_point_that_can_be_improved_has_a_gap_and_has_not_converged():
    spec = mlp(12, 24, 24, 6)
    nodes, perms = planted(spec, 4, 0.3, seed=0)
    random = [permutation.random(spec, torch.Generator().manual_seed(i)) for i in range(4)]
    lost = match(spec, nodes, start=random, max_steps=0, polish=False)
    assert lost.gap > 1e-2
    assert not lost.converged
    assert lost.gain == 0
    kept = match(spec, nodes, start=perms, max_steps=0, polish=False)
    assert kept.gap <= 1e-4
    assert kept.converged


def test_a_tolerance_below_the_gap_is_not_reached():
    spec = mlp(12, 24, 24, 6)
    nodes, _ = planted(spec, 4, 1.0, seed=0)
    rough = match(spec, nodes, max_steps=1, polish=False)
    assert rough.gap > 0
    assert not match(spec, nodes, max_steps=1, polish=False, tolerance=rough.gap / 2).converged
    assert match(spec, nodes, max_steps=1, polish=False, tolerance=rough.gap * 2).converged


def test_identical_nodes_have_neither_gap_nor_gain():
    spec = ALL["attention"]
    (node,) = draws(spec, 1)
    found = match(spec, [node] * 3)
    assert (found.gap, found.gain, found.converged) == (0.0, 0.0, True)


@each_spec
@pytest.mark.parametrize("count", [3, 5])
def test_the_gain_is_that_of_the_last_step(spec, count):
    nodes, steps = draws(spec, count, seed=2), []
    found = match(spec, nodes, start="identity", callback=steps.append)
    scale = Problem.of(spec, nodes, torch.full((count,), 1 / count, dtype=torch.float64)).scale
    assert found.gain == pytest.approx(max(found.objectives[-1] - found.objectives[-2], 0) / scale, abs=1e-15)
    assert [step for step in steps if not step.trial][-1].gain == found.gain
