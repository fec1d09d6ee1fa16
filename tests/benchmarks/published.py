"""The yardstick: C2M3's Frank-Wolfe as its authors published it, written plainly.

Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024), Algorithm 1: permutation matrices for
every node and group, sums over all pairs of models, dense products with every matrix, a bounded scalar search of the
step that evaluates the whole objective (xtol 1e-3, at most 20 evaluations), one assignment problem per node and group,
identity start. It stops when the objective has risen by less than `tolerance` (relative) for `patience` steps.
The permutation matrices here map into the universe, where the paper's map out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from scipy.optimize import linear_sum_assignment, minimize_scalar
from torch import Tensor

from c2m3_fl.core.spec import Params, PermutationSpec, TensorSpec

Matrices = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Published:
    """Permutations per node in index form, and the objective after every step; the last is that of the permutations."""

    permutations: tuple[dict[str, Tensor], ...]
    objectives: tuple[float, ...]
    steps: int


def mapped(tensor: TensorSpec, value: Tensor, matrices: dict[str, Tensor], skip: int | None = None) -> Tensor:
    """A tensor with every grouped axis but `skip` multiplied by its group's matrix."""
    for axis, segments in enumerate(tensor.axes):
        if axis == skip or not segments:
            continue
        (segment,) = segments  # the yardstick knows whole axes only, as the published code does
        moved = value.movedim(axis, 0).reshape(segment.size, -1)
        shape = value.movedim(axis, 0).shape
        value = (matrices[segment.group] @ moved).reshape(shape).movedim(0, axis)
    return value


def _matched(spec: PermutationSpec, nodes: Sequence[Params]) -> list[tuple[str, TensorSpec]]:
    """What the agreement is made of: floating point and no buffers."""
    return [
        (name, tensor)
        for name, tensor in spec.tensors.items()
        if not tensor.buffer and nodes[0][name].is_floating_point()
    ]


def objective(spec: PermutationSpec, nodes: Sequence[Params], matrices: Matrices) -> float:
    """Mean-weighted sum over all pairs of nodes of the inner products in the universe."""
    total = 0.0
    for i, j in combinations(range(len(nodes)), 2):
        for name, tensor in _matched(spec, nodes):
            left = mapped(tensor, nodes[i][name], matrices[i])
            right = mapped(tensor, nodes[j][name], matrices[j])
            total += float((left * right).sum(dtype=torch.float64))
    return total / len(nodes) ** 2


def gradient(spec: PermutationSpec, nodes: Sequence[Params], matrices: Matrices) -> Matrices:
    """Gradient of `objective`, pair by pair."""
    result = [{group: torch.zeros_like(matrix) for group, matrix in own.items()} for own in matrices]
    for i, j in permutations(range(len(nodes)), 2):
        for name, tensor in _matched(spec, nodes):
            other = mapped(tensor, nodes[j][name], matrices[j])
            for axis, segments in enumerate(tensor.axes):
                for segment in segments:
                    rest = mapped(tensor, nodes[i][name], matrices[i], skip=axis)
                    left = other.movedim(axis, 0).reshape(segment.size, -1)
                    right = rest.movedim(axis, 0).reshape(segment.size, -1)
                    result[i][segment.group] += left @ right.T / len(nodes) ** 2
    return result


def frank_wolfe_step(spec: PermutationSpec, nodes: Sequence[Params], matrices: Matrices) -> tuple[Matrices, float]:
    """One step of Algorithm 1: gradient, assignment problems, numerical search."""
    slopes = gradient(spec, nodes, matrices)
    corners = [{group: _assign(slope) for group, slope in own.items()} for own in slopes]

    def between(t: float) -> Matrices:
        return [
            {group: (1 - t) * matrix + t * corner[group] for group, matrix in own.items()}
            for own, corner in zip(matrices, corners, strict=True)
        ]

    search = minimize_scalar(
        lambda t: -objective(spec, nodes, between(float(t))),
        bounds=(0.0, 1.0),
        method="bounded",
        options={"xatol": 1e-3, "maxiter": 20},
    )
    return between(float(search.x)), -float(search.fun)


def published_match(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    *,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    patience: int = 5,
) -> Published:
    """Algorithm 1 from the identity until it stalls, and the assignment problems that round its last point."""
    like = nodes[0][_matched(spec, nodes)[0][0]]
    matrices: Matrices = [{name: torch.eye(g.size).to(like) for name, g in spec.groups.items()} for _ in nodes]
    objectives, calm = [objective(spec, nodes, matrices)], 0
    while len(objectives) <= max_steps and calm < patience:
        matrices, value = frank_wolfe_step(spec, nodes, matrices)
        calm = calm + 1 if abs(value - objectives[-1]) <= tolerance * abs(objectives[-1]) else 0
        objectives.append(value)
    corners = [{group: _assign(matrix) for group, matrix in own.items()} for own in matrices]
    final = objective(spec, nodes, corners)
    perms = tuple({group: matrix.argmax(1) for group, matrix in own.items()} for own in corners)
    return Published(perms, (*objectives, final), len(objectives) - 1)


def _assign(gain: Tensor) -> Tensor:
    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    matrix = torch.zeros_like(gain)
    matrix[rows, columns] = 1.0
    return matrix
