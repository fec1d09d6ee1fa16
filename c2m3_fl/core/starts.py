"""Where the search starts: permutations, or doubly stochastic matrices, of every node."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Literal

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.mapped import Vertex, inner, moved
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.places import Place, warm
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.profiles import profile_vertex
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.universe import Point
from c2m3_fl.errors import ConfigError

StartName = Literal["auto", "identity", "profiles", "barycentre", "sinkhorn", "random"]
Start = StartName | Sequence[Permutation]

_NAMES = ("auto", "identity", "profiles", "barycentre", "sinkhorn", "random")
_SINKHORN_SWEEPS = 50  # row and column normalisations; the noise is mild, so ten already reach float32 rounding


def check_start(spec: PermutationSpec, start: Start, count: int) -> None:
    """Raise `ConfigError` for an unknown name and `SpecError` for permutations that the spec does not allow."""
    if isinstance(start, str):
        if start not in _NAMES:
            raise ConfigError(f"start is {start!r}, expected one of {list(_NAMES)} or one permutation per node")
        if start == "sinkhorn" and spec.rotations:
            raise ConfigError(f"start is 'sinkhorn', but group {spec.rotations[0]!r} rotates; use 'random' instead")
        return
    if len(start) != count:
        raise ConfigError(f"start holds {len(start)} permutations, expected one for each of the {count} nodes")
    for index, perm in enumerate(start):
        permutation.validate(spec, perm, f"start[{index}]")


def begin(
    problem: Problem, start: Start, generator: torch.Generator | None, pool: Executor
) -> tuple[Point, tuple[float, ...]]:
    """The point to start from, and the agreement of the nodes as they stand where "auto" chose a better one.

    Parameters
    ----------
    problem : Problem
        What is to be matched, the nodes as they stand.
    start : str or sequence of Permutation
        See `match`; permutations are those of the nodes that are not frozen, in the order of the problem.
    generator : torch.Generator, optional
        Source of the "sinkhorn" and "random" starts; by default one with seed 0.
    pool : Executor
        Where assignment problems are solved.
    """
    if isinstance(start, str) and start == "profiles":
        return Point(profile_vertex(problem, pool)), ()
    if start != "auto":
        return start_point(problem, start, generator), ()
    if problem.spec.rotations:  # profiles know nothing of them, and from the barycentre most rotated copies are found
        return start_point(problem, "barycentre", generator), (problem.objective(),)
    vertex = profile_vertex(problem, pool)
    if _sum_square(problem, vertex) <= _sum_square(problem, {}):
        return start_point(problem, "identity", generator), ()
    return Point(vertex), (problem.objective(),)


def _sum_square(problem: Problem, vertex: Vertex) -> float:
    """Squared norm of the nodes' weighted sum at a vertex ({}: as they stand), the part of the agreement that moves."""
    total = 0.0
    indices = [{name: index[node] for name, index in vertex.items()} for node in range(problem.count)]
    for term in problem.terms:
        mean = torch.zeros_like(term.value[0])
        for node, (index, share) in enumerate(zip(indices, problem.weights.tolist(), strict=True)):
            mean.add_(moved(term, term.value[node], index), alpha=share)
        total += inner(mean, mean)
    return total


def start_point(problem: Problem, start: Start, generator: torch.Generator | None) -> Point:
    """A start that takes no assignment problem; frozen nodes at the identity.

    Parameters
    ----------
    problem : Problem
        What is to be matched.
    start : {"identity", "barycentre", "sinkhorn", "random"} or sequence of Permutation
        See `begin`.
    generator : torch.Generator, optional
        See `begin`.
    """
    spec, count = problem.spec, problem.count - problem.frozen
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    still = [permutation.identity(spec)] * problem.frozen
    if not isinstance(start, str):
        return at_perms(problem, [*still, *start])
    if start == "random":
        return at_perms(problem, [*still, *(permutation.random(spec, generator) for _ in range(count))])
    here = at_perms(problem, [permutation.identity(spec)] * problem.count)
    if start == "barycentre":
        # With every node at the exact barycentre all rows of the gradient are equal and nothing moves; the agreement
        # is invariant under permutations of the universe, so one node's gauge may be fixed.
        return Point(here.frames, _warm(problem, 1.0, max(1, problem.frozen)))
    if start == "sinkhorn":
        noise = {name: _noise(problem.count, group.size, generator) for name, group in spec.groups.items()}
        soft = _soft(problem, noise)
        nodes = range(problem.frozen, problem.count)
        return Point(here.frames, {node: {name: each[node] for name, each in soft.items()} for node in nodes})
    return here


def soften(problem: Problem, perms: Sequence[Permutation], warmth: float) -> Point:
    """The point at the share `warmth` of the way from permutations to the barycentre; frozen nodes stay.

    Parameters
    ----------
    problem : Problem
        What is matched.
    perms : sequence of Permutation
        One per node, those of frozen nodes included.
    warmth : float
        Between 0, the permutations, and 1, the barycentre.
    """
    return Point(at_perms(problem, perms).frames, _warm(problem, warmth, problem.frozen))


def at_perms(problem: Problem, perms: Sequence[Permutation]) -> Point:
    """One permutation per node."""
    frames = problem.frames.items()
    return Point({name: torch.stack([perm[name].cpu() for perm in perms]).to(rows) for name, rows in frames})


def _warm(problem: Problem, warmth: float, first: int) -> dict[int, dict[str, Place]]:
    """All groups of all nodes but the first ones on the way to the barycentre."""
    places = {name: warm(warmth, group.kind) for name, group in problem.spec.groups.items()}
    return {node: dict(places) for node in range(first, problem.count)}


def _noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, size, size, generator=generator, dtype=torch.float64).exp()


def _soft(problem: Problem, positive: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale positive matrices to doubly stochastic ones; nested groups spread inside the pairs of their parents."""
    point = {}
    for name, group in problem.spec.groups.items():
        if group.parent is None:
            soft = _sinkhorn(positive[name])
        else:
            block = group.size // problem.spec.groups[group.parent].size
            inner = positive[name].reshape(problem.count, -1, block, group.size // block, block).transpose(2, 3)
            soft = _sinkhorn(positive[group.parent])[:, :, :, None, None] * _sinkhorn(inner)
            soft = soft.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        point[name] = soft.to(problem.like)
    return point


def _sinkhorn(positive: Tensor) -> Tensor:
    """Scale the rows and columns of positive matrices to sums of one."""
    for _ in range(_SINKHORN_SWEEPS):
        positive = positive / positive.sum(-1, keepdim=True)
        positive = positive / positive.sum(-2, keepdim=True)
    return positive
