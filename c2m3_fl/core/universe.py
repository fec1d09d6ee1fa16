"""The agreement of all nodes in the universe: its value, its gradient, and its exact course along a step.

With U_i the parameters of node i mapped into the universe and M = sum_i w_i U_i,

    f = sum_{i<j} w_i w_j <U_i, U_j> = (|M|^2 - sum_i w_i^2 |U_i|^2) / 2,

so value, gradient and step cost O(nodes). A block of nodes moves while the others stay: with O their sum,

    f = <O, sum_block w_i U_i> + (|sum_block w_i U_i|^2 - sum_block w_i^2 |U_i|^2) / 2 + constant,

whose second part vanishes for a block of one node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2m3_fl.core.line_search import added, power_basis
from c2m3_fl.core.mapped import Mapped, Vertex, weighted_sum
from c2m3_fl.core.problem import Problem, work_of


class Universe:
    """The mapped tensors of every term at the current point of a search, and their weighted sums; changed in place.

    Parameters
    ----------
    problem : Problem
        What is to be matched.
    point : mapping of str to Tensor, shape (nodes, size, size)
        Doubly stochastic matrices: where the search stands. They move along.

    Attributes
    ----------
    work : int
        Work so far: that of every gradient and of the assignment problems that it poses; see `work_of`.
    """

    def __init__(self, problem: Problem, point: dict[str, Tensor]) -> None:
        self.problem, self.point = problem, point
        self.work = 0
        self._weights = problem.weights.to(problem.like.device)
        self._node_work = work_of(problem.spec.groups, problem.terms)
        self.mapped = [Mapped(term, point) for term in problem.terms]
        for each in self.mapped:
            each.own()
        self.means = [weighted_sum(each.universe, self._weights) for each in self.mapped]

    def objective(self) -> float:
        """The weighted agreement over all pairs of nodes; the sums are added up anew, which keeps rounding small."""
        total = self._weights.new_tensor(self.problem.constant)
        for each, mean in zip(self.mapped, self.means, strict=True):
            part, fresh = each.agreement(self._weights)
            total += part
            mean.copy_(fresh)
        return float(total)

    def vertex(self, block: slice) -> dict[str, Tensor]:
        """Where most of the mass of each unit of a block is, shape (nodes of the block, size)."""
        return {name: matrices[block].argmax(-1) for name, matrices in self.point.items()}

    def others(self, block: slice) -> list[Tensor]:
        """For every term the weighted sum of the nodes outside a block."""
        weights = self._weights[block]
        return [
            torch.sub(mean, weighted_sum(each.universe[block], weights))
            for each, mean in zip(self.mapped, self.means, strict=True)
        ]

    def gradient(self, block: slice, others: Sequence[Tensor]) -> dict[str, Tensor]:
        """Per group, shape (nodes of the block, size, size); every node's own weight, a common factor, is left out."""
        problem = self.problem
        self.work += (block.stop - block.start) * self._node_work
        into = {
            name: problem.like.new_zeros(block.stop - block.start, group.size, group.size)
            for name, group in problem.spec.groups.items()
        }
        for each, rest in zip(self.mapped, others, strict=True):
            each.gradient(block, self._weights, rest, into)
        return into

    def course(self, block: slice, others: Sequence[Tensor], vertex: Vertex) -> list[float]:
        """The agreement on the way of a block to a vertex: coefficients of t^0, t^1, ..., up to a constant."""
        parts = [
            part
            for each, rest in zip(self.mapped, others, strict=True)
            for part in each.course(block, vertex, self._weights, rest)
        ]
        if not parts:
            return added([])
        numbers = iter(torch.cat(parts).tolist())  # one copy from the device for all of them
        return added([power_basis([next(numbers) for _ in part]) for part in parts])

    def advance(self, block: slice, others: Sequence[Tensor], vertex: Vertex, step_size: float) -> None:
        """Move a block of nodes towards a vertex."""
        weights = self._weights
        for each, rest, mean in zip(self.mapped, others, self.means, strict=True):
            each.advance(block, vertex, step_size)
            torch.add(rest, weighted_sum(each.universe[block], weights[block]), out=mean)
        for name, matrices in self.point.items():
            weight = matrices.new_tensor(step_size).expand(*vertex[name].shape, 1)
            matrices[block].mul_(1 - step_size).scatter_add_(2, vertex[name][..., None], weight)
