"""Matches of networks that rotate: the gradient, the step, the ascent, the gap, and copies that are brought back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from c2m3_fl.core import join, match, match_in_batches, permutation, weighted_mean
from c2m3_fl.core.axes import Kind
from c2m3_fl.core.basis import into_basis
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.pairwise import merge_many
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import Group, Params, PermutationSpec, Segment, TensorSpec
from c2m3_fl.core.starts import StartName, soften, start_point
from c2m3_fl.core.universe import Universe
from c2m3_fl.errors import ConfigError
from tests.core.networks import at_matrices, autograd, on, pairwise_agreement
from tests.core.rotating import ROTATING, draw
from tests.core.test_rotations import apart, drawn, each_spec

WEIGHTS = [0.5, 0.2, 0.3]


def nodes_of(spec: PermutationSpec, count: int = 3, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    return [draw(spec, seed, dtype) for seed in range(count)]


def problem_of(spec: PermutationSpec) -> Problem:
    return Problem.of(spec, nodes_of(spec), torch.tensor(WEIGHTS, dtype=torch.float64))


def matrix(index: Tensor) -> Tensor:
    return index if index.ndim > 1 else torch.eye(len(index), dtype=torch.float64)[index]


def inside(spec: PermutationSpec) -> dict[str, Tensor]:
    """Points inside the hull, as matrices of shape (nodes, size, size): halfway between two elements of the spec."""
    halves = [
        [{name: 0.5 * matrix(each) for name, each in drawn(spec, s).items()} for s in (i, 9 + i)] for i in range(3)
    ]
    return {name: torch.stack([one[name] + other[name] for one, other in halves]) for name in spec.groups}


def rotated(params: Params, spec: PermutationSpec, seed: int) -> dict[str, Tensor]:
    return permutation.apply(spec, drawn(spec, seed), params)


@each_spec
def test_the_objective_is_the_sum_over_pairs(spec: PermutationSpec) -> None:
    perms, problem = [drawn(spec, seed) for seed in range(3)], problem_of(spec)
    for each in (perms[::-1], perms):  # one after the other: the second from where the first one left the nodes
        universe = Universe(problem, start_point(problem, each, None))
        assert universe.objective == pytest.approx(pairwise_agreement(spec, nodes_of(spec), each, WEIGHTS), rel=1e-12)


@each_spec
def test_the_gradient_is_that_of_autograd(spec: PermutationSpec) -> None:
    problem, point = problem_of(spec), inside(spec)
    expected = autograd(problem, point)
    for name, found in at_matrices(problem, point).gradient(range(3)).items():
        torch.testing.assert_close(problem.weights[:, None, None] * found, expected[name], rtol=1e-11, atol=1e-11)


@each_spec
@pytest.mark.parametrize("block", [range(1, 2), range(3)], ids=["one node", "all"])
@pytest.mark.parametrize("soft", [True, False], ids=["from inside", "from rotations"])
def test_the_exact_step_is_best_on_the_way_to_the_vertex(spec: PermutationSpec, block: range, soft: bool) -> None:
    def universe() -> Universe:
        problem = problem_of(spec)
        starts = [drawn(spec, 5 + i) for i in range(3)]
        return at_matrices(problem, inside(spec)) if soft else Universe(problem, start_point(problem, starts, None))

    vertex = {name: torch.stack([drawn(spec, i)[name] for i in block]) for name in spec.groups}
    moving = universe()
    course = moving.course(block, moving.gradient(block), vertex)
    best, height = best_step(course)
    for step in (0.0, 0.2, 0.5, 0.8, 1.0, best):
        moving = universe()
        before = moving.objective
        moving.advance(block, vertex, step)
        there = sum(c * step**power for power, c in enumerate(course)) - course[0]
        assert moving.add_up() - before == pytest.approx(there, rel=1e-10, abs=1e-10)
        assert there <= height - course[0] + 1e-10


@each_spec
@pytest.mark.parametrize("start", ["auto", "identity", "barycentre", "random", "profiles"])
def test_ascent_is_monotone_and_cycles_close(spec: PermutationSpec, start: StartName) -> None:
    nodes = nodes_of(spec, 4)  # four are reheated
    found = match(spec, nodes, start=start, weights=[1, 2, 3, 4])
    rises = np.diff(found.objectives[1 if start == "auto" else 0 :])
    if spec is not ROTATING["recurrent"]:  # a space on two axes may lose when the point inside is rounded to rotations
        assert rises.min() >= -1e-9 * abs(found.objectives[-1])
    assert rises.sum() > 0
    assert found.gap >= 0
    for perm in found.permutations:
        permutation.validate(spec, perm)
    around = permutation.identity(spec)
    for source, to in ((0, 1), (1, 2), (2, 3), (3, 0)):
        around = permutation.compose(found.between(to, source), around)
    assert apart(around, permutation.identity(spec)) < 1e-12
    assert permutation.cycle_error(found.permutations) == 0
    agreement = pairwise_agreement(spec, nodes, found.permutations, [0.1, 0.2, 0.3, 0.4])
    assert found.objectives[-1] == pytest.approx(agreement, rel=1e-9)


def one_space(kind: str = "orthogonal") -> PermutationSpec:
    groups = {"g": Group(4, kind=kind)}  # type: ignore[arg-type]  # one of the kinds
    return PermutationSpec(groups, {"w": TensorSpec((4, 9), (on("g", 4), ()))})


def test_two_nodes_and_one_space_are_procrustes() -> None:
    spec = one_space()
    nodes = nodes_of(spec, 2)
    found = match(spec, nodes, max_steps=500)
    left, right = (node["w"].numpy() for node in nodes)
    expected = orthogonal_procrustes(right.T, left.T)[0].T
    np.testing.assert_allclose(found.between(0, 1)["g"].numpy(), expected, atol=1e-9)
    nuclear = np.linalg.svd(left @ right.T)[1].sum()
    assert found.objectives[-1] == pytest.approx(0.25 * nuclear, rel=1e-12)
    assert found.gap <= 1e-12


def test_two_nodes_that_fix_the_vector_of_ones_are_centred_procrustes() -> None:
    spec = one_space("centred")
    left, right = nodes_of(spec, 2)
    found = match(spec, [left, right]).between(0, 1)["g"].numpy()
    basis = np.linalg.svd(np.ones((1, 4)))[2][1:].T  # of the subspace orthogonal to the vector of ones
    inner = orthogonal_procrustes(right["w"].numpy().T @ basis, left["w"].numpy().T @ basis)[0].T
    np.testing.assert_allclose(found, basis @ inner @ basis.T + 0.25, atol=1e-9)


# How many of 20 rotated copies a match brings back, to one percent of an entry's spread; local optima exist.
RATES: dict[tuple[str, StartName], int] = {
    ("attention", "identity"): 19,
    ("attention", "barycentre"): 20,
    ("factorised", "identity"): 14,
    ("factorised", "barycentre"): 20,
    ("recurrent", "identity"): 13,
    ("recurrent", "barycentre"): 20,
    ("shared keys", "identity"): 12,
    ("shared keys", "barycentre"): 20,
    ("shared keys", "auto"): 20,
}


@pytest.mark.parametrize(("name", "start"), RATES)
def test_rotated_copies_are_brought_back(name: str, start: StartName) -> None:
    spec, back = ROTATING[name], 0
    for seed in range(20):
        params = draw(spec, 100 + seed, torch.float32)
        copy = rotated(params, spec, seed)
        found = match(spec, [params, copy], start=start)
        back += apart(permutation.apply(spec, found.between(0, 1), copy), params) < 1e-2
    assert back >= RATES[name, start]


@each_spec
def test_identical_nodes_stay_and_their_mean_is_the_node(spec: PermutationSpec) -> None:
    node = draw(spec, 0, torch.float32)
    found = match(spec, [node, dict(node), dict(node)])
    assert all(permutation.is_identity(perm) for perm in found.permutations)
    universe = [permutation.apply(spec, perm, node) for perm in found.permutations]
    assert all(torch.equal(value, node[name]) for name, value in weighted_mean(universe).items())


@each_spec
def test_a_space_that_has_not_moved_stays_bit_for_bit(spec: PermutationSpec) -> None:
    """Two nodes that differ by what no rotation can mend: the gradient is symmetric, and the answer the identity."""
    node = draw(spec, 0, torch.float32)
    found = match(spec, [node, {name: 2 * value for name, value in node.items()}], start="identity")
    assert all(permutation.is_identity(perm) for perm in found.permutations)


@each_spec
def test_a_drift_worth_less_than_a_unit_moves_nothing(spec: PermutationSpec) -> None:
    node = draw(spec, 0)
    drifted = {name: value + 3e-2 * draw(spec, 1)[name] for name, value in node.items()}
    found = match(spec, [node, drifted])
    assert all(permutation.is_identity(perm) for perm in found.permutations)
    assert found.converged
    assert found.gap > 0
    moved = match(spec, [node, drifted], start="identity", tolerance=1e-9)
    assert not permutation.is_identity(moved.between(0, 1))
    assert moved.objectives[-1] > found.objectives[-1]


@pytest.mark.parametrize("scale", [1.0, 0.2, 0.05])
@pytest.mark.parametrize("moved", ["head", "qk"])
def test_permutations_count_however_little_they_gain_beside_rotations(moved: str, scale: float) -> None:
    """Linear attention: the units of queries and keys permute within heads, those of values rotate."""
    groups = {"head": Group(3), "qk": Group(12, "head"), "vo": Group(12, "head", "orthogonal")}
    tensors = {name: TensorSpec((12, 5), (on("qk", 12), ())) for name in "qk"}
    tensors |= {"v": TensorSpec((12, 5), (on("vo", 12), ())), "o": TensorSpec((5, 12), ((), on("vo", 12)))}
    spec = PermutationSpec(groups, tensors)
    node = {name: value * (scale if name in "qk" else 1) for name, value in draw(spec, 0).items()}
    if moved == "head":  # of two heads, weak in all of their units, that are exchanged
        node = {name: value * (scale if name == "o" else 1) for name, value in node.items()}
        for name in "qkv":
            node[name][:8] *= scale
    planted = permutation.identity(spec)
    if moved == "head":
        planted |= {"head": torch.tensor([1, 0, 2]), "qk": torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11])}
        planted["vo"] = torch.eye(12, dtype=torch.float64)[planted["qk"]]
    else:
        planted["qk"] = torch.arange(12).view(3, 4).flip(1).flatten()
    found = match(spec, [node, permutation.apply(spec, planted, node)]).between(0, 1)
    assert torch.equal(found["qk"], permutation.invert(planted)["qk"])


@pytest.mark.parametrize("kind", ["orthogonal", "centred"])
def test_two_coordinates_of_many_that_were_exchanged_are_brought_back(kind: Kind) -> None:
    units = (Segment.contiguous("g", 60),)
    spec = PermutationSpec({"g": Group(60, kind=kind)}, {"w": TensorSpec((60, 90), (units, ()))})
    node = {"w": torch.randn(60, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    node["w"] -= node["w"].mean(0)
    order = torch.arange(60)
    order[[3, 7]] = torch.tensor([7, 3])
    copy = {"w": node["w"][order] + 0.3 * torch.randn(60, 90, generator=torch.Generator().manual_seed(1))}
    back = permutation.apply(spec, match(spec, [node, copy], weights=[0.9, 0.1]).between(0, 1), copy)
    assert float((back["w"] - node["w"]).square().mean()) < 0.11  # of the noise alone .09, of the exchange 2/30


@each_spec
def test_rotating_the_nodes_does_not_change_the_optimum(spec: PermutationSpec) -> None:
    nodes, starts = nodes_of(spec, 3), [drawn(spec, seed) for seed in range(3)]
    turns = [drawn(spec, 10 + seed) for seed in range(3)]
    there = [permutation.apply(spec, turn, node) for turn, node in zip(turns, nodes, strict=True)]
    begin = [permutation.compose(s, permutation.invert(turn)) for s, turn in zip(starts, turns, strict=True)]
    objectives = [match(spec, each, start=s).objectives[0] for each, s in ((nodes, starts), (there, begin))]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-10)


@each_spec
def test_a_soft_point_is_inside_the_hull(spec: PermutationSpec) -> None:
    problem = problem_of(spec)
    universe = Universe(problem, soften(problem, [drawn(spec, i) for i in range(3)], 0.5))
    for name, group in spec.groups.items():
        place = universe.matrix(1, name)
        assert float(torch.linalg.matrix_norm(place, 2)) <= 1 + 1e-12
        if group.kind == "centred":
            torch.testing.assert_close(place.sum(1), torch.ones(group.size, dtype=torch.float64))


@each_spec
def test_joining_batches_and_bases(spec: PermutationSpec) -> None:
    base = draw(spec, 0)
    nodes = [rotated(base, spec, seed) for seed in range(3)]
    joined = join(spec, nodes[0], nodes[1:], start="barycentre")
    permutation.validate(spec, joined.permutations[0])
    assert joined.objectives[-1] > joined.objectives[0]
    batches = match_in_batches(spec, nodes, batch=2)
    assert batches.objective == pytest.approx(
        pairwise_agreement(spec, nodes, batches.permutations, [1 / 3] * 3), rel=1e-9
    )
    permutation.validate(spec, into_basis(spec, nodes[0], nodes[1]))
    for perm in merge_many(spec, nodes):
        permutation.validate(spec, perm)


def test_sinkhorn_noise_is_refused() -> None:
    spec = ROTATING["attention"]
    with pytest.raises(ConfigError, match="start is 'sinkhorn', but group 'stream' rotates"):
        match(spec, nodes_of(spec), start="sinkhorn")


def test_known_rotations_of_single_precision_are_a_start() -> None:
    spec = ROTATING["attention"]
    starts: list[Permutation] = [
        {name: each.float() if each.ndim > 1 else each for name, each in drawn(spec, seed).items()} for seed in range(2)
    ]
    found = match(spec, nodes_of(spec, 2), start=starts, max_steps=0, polish=False)
    assert apart(found.permutations[0], starts[0]) < 1e-6
