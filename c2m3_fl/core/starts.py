"""Where the search starts: one doubly stochastic matrix for every node and group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import ConfigError

StartName = Literal["identity", "barycentre", "sinkhorn", "random"]
Start = StartName | Sequence[Permutation]

_NAMES = ("identity", "barycentre", "sinkhorn", "random")
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


def start_point(problem: Problem, start: Start, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The doubly stochastic matrices to start from, shape (nodes, size, size); frozen nodes at the identity."""
    spec, count = problem.spec, problem.count - problem.frozen
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    here = [permutation.identity(spec)] * problem.frozen
    if not isinstance(start, str):
        return _at_vertex(problem, [*here, *start])
    if start == "identity":
        return _at_vertex(problem, [permutation.identity(spec)] * problem.count)
    if start == "random":
        return _at_vertex(problem, [*here, *(permutation.random(spec, generator) for _ in range(count))])
    if start == "barycentre":
        # With every node at the exact barycentre all rows of the gradient are equal and nothing moves; the agreement
        # does not change when the universe is permuted, so one node's gauge may be fixed.
        positive = {name: torch.ones(problem.count, group.size, group.size) for name, group in spec.groups.items()}
        return _fixed(_soft(problem, positive), max(1, problem.frozen))
    noise = {name: _noise(problem.count, group.size, generator) for name, group in spec.groups.items()}
    return _fixed(_soft(problem, noise), problem.frozen)


def _at_vertex(problem: Problem, perms: Sequence[Permutation]) -> dict[str, Tensor]:
    """Permutations in matrix form."""
    return {
        name: torch.stack([torch.eye(group.size)[perm[name].cpu()] for perm in perms]).to(problem.like)
        for name, group in problem.spec.groups.items()
    }


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
