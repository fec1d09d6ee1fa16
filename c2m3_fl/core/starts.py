"""Where the search starts: one doubly stochastic matrix for every node and group."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Literal

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.mapped import Mapped, Vertex, gather, inner, weighted_sum
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.profiles import profile_vertex
from c2m3_fl.core.spec import PermutationSpec
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
        return
    if len(start) != count:
        raise ConfigError(f"start holds {len(start)} permutations, expected one for each of the {count} nodes")
    for index, perm in enumerate(start):
        permutation.validate(spec, perm, f"start[{index}]")


def begin(
    problem: Problem, start: Start, generator: torch.Generator | None, pool: Executor
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """The point to start from, and the agreement of the nodes as they stand where "auto" chose a better one.

    Parameters
    ----------
    problem : Problem
        What is to be matched.
    start : str or sequence of Permutation
        See `match`; permutations are those of the nodes that are not frozen, in the order of the problem.
    generator : torch.Generator, optional
        Source of the "sinkhorn" and "random" starts; by default one with seed 0.
    pool : Executor
        Where assignment problems are solved.
    """
    if isinstance(start, str) and start == "profiles":
        return _at_vertex(problem, profile_vertex(problem, pool)), ()
    if start != "auto":
        return start_point(problem, start, generator), ()
    vertex = profile_vertex(problem, pool)
    if _sum_square(problem, vertex) <= _sum_square(problem, {}):
        return start_point(problem, "identity", generator), ()
    return _at_vertex(problem, vertex), (problem.objective([Mapped(term) for term in problem.terms]),)


def _sum_square(problem: Problem, vertex: Vertex) -> float:
    """Squared norm of the nodes' weighted sum at a vertex ({}: as they stand), the part of the agreement that moves."""
    total = 0.0
    for term in problem.terms:
        value = term.value
        for axis, group in enumerate(term.groups):
            if group in vertex:
                value = gather(value, term.dim(axis), vertex[group])
        mean = weighted_sum(value, problem.weights)
        total += inner(mean, mean)
    return total


def start_point(problem: Problem, start: Start, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The doubly stochastic matrices of a start that takes no assignment problem; frozen nodes at the identity.

    Parameters
    ----------
    problem : Problem
        What is to be matched.
    start : {"identity", "barycentre", "sinkhorn", "random"} or sequence of Permutation
        See `begin`.
    generator : torch.Generator, optional
        See `begin`.

    Returns
    -------
    dict of str to Tensor, shape (nodes, size, size)
    """
    spec, count = problem.spec, problem.count - problem.frozen
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    here = [permutation.identity(spec)] * problem.frozen
    if not isinstance(start, str):
        return _at_perms(problem, [*here, *start])
    if start == "identity":
        return _at_perms(problem, [permutation.identity(spec)] * problem.count)
    if start == "random":
        return _at_perms(problem, [*here, *(permutation.random(spec, generator) for _ in range(count))])
    if start == "barycentre":
        # With every node at the exact barycentre all rows of the gradient are equal and nothing moves; the agreement
        # is invariant under permutations of the universe, so one node's gauge may be fixed.
        positive = {name: torch.ones(problem.count, group.size, group.size) for name, group in spec.groups.items()}
        return _fixed(_soft(problem, positive), max(1, problem.frozen))
    noise = {name: _noise(problem.count, group.size, generator) for name, group in spec.groups.items()}
    return _fixed(_soft(problem, noise), problem.frozen)


def soften(problem: Problem, perms: Sequence[Permutation], warmth: float) -> dict[str, Tensor]:
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
    point = _at_perms(problem, perms)
    for matrices in point.values():
        matrices[problem.frozen :].mul_(1 - warmth).add_(warmth / matrices.shape[1])
    return point


def _at_perms(problem: Problem, perms: Sequence[Permutation]) -> dict[str, Tensor]:
    """One permutation per node in matrix form."""
    return _at_vertex(
        problem, {name: torch.stack([perm[name].cpu() for perm in perms]) for name in problem.spec.groups}
    )


def _at_vertex(problem: Problem, vertex: Vertex) -> dict[str, Tensor]:
    """Index forms, shape (nodes, size), in matrix form."""
    return {name: torch.eye(index.shape[1])[index.cpu()].to(problem.like) for name, index in vertex.items()}


def _fixed(point: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The point with its first nodes put at the identity."""
    for matrices in point.values():
        matrices[:count] = torch.eye(matrices.shape[1]).to(matrices)
    return point


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
