"""The agreement of all nodes in the universe: its value, its gradient, and its exact course along a step.

With U_i the parameters of node i mapped into the universe and M = sum_i w_i U_i,

    f = sum_{i<j} w_i w_j <U_i, U_j> = (|M|^2 - sum_i w_i^2 |U_i|^2) / 2,

so value, gradient and step cost O(nodes). A block of nodes moves while the others stay: with O their sum,

    f = <O, sum_block w_i U_i> + (|sum_block w_i U_i|^2 - sum_block w_i^2 |U_i|^2) / 2 + constant,

whose second part vanishes for a block of one node. Every node is kept once, in the order of the permutations where it
was last (`mapped`): a node at permutations is its own image, and gradients and vertices are relative to that order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from c2m3_fl.core.line_search import added, power_basis
from c2m3_fl.core.mapped import Vertex, agreement, contract, dot, half_square, image, moved
from c2m3_fl.core.permutation import moving
from c2m3_fl.core.places import FRAME, Place, mass, matrix_of, nearest, towards, worth
from c2m3_fl.core.problem import Problem, work_of
from c2m3_fl.core.shifts import Shift, shift_of
from c2m3_fl.core.terms import Term


@dataclass(frozen=True, eq=False)
class Point:
    """Where nodes stand.

    Attributes
    ----------
    frames : mapping of str to Tensor of int64, shape (nodes, size)
        Permutations into the universe.
    places : mapping of int to mappings of str to Place
        Of the nodes that are not at permutations: where their groups stand, relative to the frames; see `places`.
    """

    frames: Vertex
    places: Mapping[int, Mapping[str, Place]] = field(default_factory=dict)


class Universe:
    """All nodes at the current point of a search, and their weighted sum; changed in place.

    Parameters
    ----------
    problem : Problem
        What is to be matched. Its terms move along: a problem has one universe at a time.
    point : Point
        Where the search starts.

    Attributes
    ----------
    places : list of dict of str to Place
        Per node the places of the groups that are not at permutations.
    objective : float
        The weighted agreement over all pairs of nodes when it was last added up.
    work : int
        Work so far: that of every gradient and of the assignment problems that it poses; see `work_of`.
    """

    def __init__(self, problem: Problem, point: Point) -> None:
        self.problem = problem
        self.work = 0
        self._shares: list[float] = problem.weights.tolist()
        self._node_work = work_of(problem.spec.groups, problem.terms)
        for node in range(problem.count):
            problem.move(node, _relative(problem.frame(node), {k: rows[node] for k, rows in point.frames.items()}))
        self.places = [dict(point.places.get(node, {})) for node in range(problem.count)]
        self.means = [torch.zeros_like(term.value[0]) for term in problem.terms]
        self._parts: dict[int, Tensor] = {}
        self.objective = self.add_up()

    def add_up(self, *, anew: bool = True) -> float:
        """The weighted agreement over all pairs of nodes.

        Parameters
        ----------
        anew : bool
            Add up all sums anew, which keeps rounding small. False: only those of terms of which more than some units
            of a node have moved since; the others know what every move has gained.
        """
        for number, (term, mean) in enumerate(zip(self.problem.terms, self.means, strict=True)):
            if anew or number not in self._parts:
                nodes = (self.node(term, node) for node in range(self.problem.count))
                self._parts[number] = agreement(nodes, self._shares, mean)
        parts = [self._parts[number] for number in range(len(self.problem.terms))]
        self.objective = self.problem.constant + (float(torch.stack(parts).sum()) if parts else 0.0)
        return self.objective

    def node(self, term: Term, node: int) -> Tensor:
        """A node's part of a term, in the universe."""
        return image(term, term.value[node], self.places[node])

    def nearest(self, block: range) -> dict[str, Tensor]:
        """Where most of the mass of a block's units is, relative to the frames, shape (nodes of the block, size)."""
        like = self.problem.like
        return {
            name: torch.stack(
                [
                    self.matrix(node, name)
                    if group.orthogonal
                    else nearest(self.places[node].get(name, FRAME), group.size, like)
                    for node in block
                ]
            )
            for name, group in self.problem.spec.groups.items()
        }

    def others(self, number: int, node: int) -> Tensor:
        """The weighted sum of the other nodes' parts of the term of this number."""
        return torch.sub(self.means[number], self.node(self.problem.terms[number], node), alpha=self._shares[node])

    def slope(self, number: int, node: int, others: Tensor, into: Mapping[str, Tensor]) -> None:
        """Add a term's gradient for one node to those of its groups; the node's weight is left out."""
        term = self.problem.terms[number]
        for axis, group in enumerate(term.groups):
            if group in into:
                rest = image(term, term.value[node], self.places[node], without=[axis])
                contract(others, rest, term.dim(axis) - 1, into[group])

    def gradient(self, block: range) -> dict[str, Tensor]:
        """Per group, shape (nodes of the block, size, size); every node's own weight, a common factor, is left out."""
        problem = self.problem
        self.work += len(block) * self._node_work
        into = {
            name: problem.like.new_zeros(len(block), group.size, group.size)
            for name, group in problem.spec.groups.items()
        }
        for row, node in enumerate(block):
            own = {name: gradients[row] for name, gradients in into.items()}
            for number in range(len(problem.terms)):
                self.slope(number, node, self.others(number, node), own)
        return into

    def course(self, block: range, gradient: Mapping[str, Tensor], vertex: Vertex) -> list[float]:
        """The agreement on the way of a block to a vertex: coefficients of t^0, t^1, ..., up to a constant.

        The way of one node in terms of one or two grouped axes is a parabola: the gradient is its slope at the start,
        and its end is known. Other terms add the inner products of all their mixtures.
        """
        node, alone, rises, curves = block.start, len(block) == 1, [], []
        index = self._changing(node, _row(vertex, 0))
        for number, term in enumerate(self.problem.terms):
            if not alone or len(term.groups) > 2:
                curves += self._mixtures(number, block, vertex)
            elif any(group in index for group in term.groups):
                rises.append(dot(self.others(number, node), self.change(number, node, index)))
        mixed = added(curves)
        if not alone:
            return mixed
        slope = self._shares[node] * self.gain(node, gradient, vertex) - mixed[1]
        rise = self._shares[node] * float(torch.stack(rises).sum()) if rises else 0.0
        return added([[0.0, slope, rise - slope], mixed])

    def gain(self, node: int, gradient: Mapping[str, Tensor], vertex: Vertex) -> float:
        """What a linear agreement would gain on the way of one node to a vertex; the node's weight is left out."""
        gains = [
            worth(each[0], vertex[name][0]) - mass(each[0], self.places[node].get(name, FRAME))
            for name, each in gradient.items()
        ]
        return float(torch.stack(gains).sum()) if gains else 0.0

    def advance(self, block: range, vertex: Vertex, step_size: float) -> None:
        """Move a block of nodes towards a vertex."""
        for row, node in enumerate(block):
            index = _row(vertex, row)
            if step_size == 1.0:
                self.settle(node, index)
                continue
            places = {
                name: towards(self.places[node].get(name, FRAME), rows, step_size, self.problem.like)
                for name, rows in index.items()
            }
            for term, mean in zip(self.problem.terms, self.means, strict=True):
                mean.sub_(self.node(term, node), alpha=self._shares[node])
                mean.add_(image(term, term.value[node], places), alpha=self._shares[node])
            self.places[node] = dict(places)
            self._parts.clear()

    def settle(self, node: int, index: Mapping[str, Tensor], followed: Collection[int] = ()) -> dict[int, Shift | None]:
        """Put groups of a node at permutations of its frame, which moves along.

        Parameters
        ----------
        node : int
            The node.
        index : mapping of str to Tensor
            Permutations of some of its groups.
        followed : collection of int
            Numbers of the terms of which only what has moved is changed, where that is little.

        Returns
        -------
        dict of int to Shift or None
            By the number of every term that has changed: what, or None where it is more than some units of one axis.
        """
        index = self._changing(node, index)
        terms, places = self.problem.terms, self.places[node]
        shifts = {
            n: shift_of(terms[n], terms[n].value[node], places, index) if n in followed else None
            for n in self.problem.touched(index)
        }
        share, whole = self._shares[node], [number for number, shift in shifts.items() if shift is None]
        for number in whole:
            self._parts.pop(number, None)
            self.means[number].sub_(self.node(self.problem.terms[number], node), alpha=share)
        self.problem.move(node, index, whole)
        for name in index:
            self.places[node].pop(name, None)
        for number in whole:
            self.means[number].add_(self.node(self.problem.terms[number], node), alpha=share)
        for number, shift in shifts.items():
            if shift is not None:
                self._apply(number, node, shift)
        return shifts

    def _apply(self, number: int, node: int, shift: Shift) -> None:
        """Move a node's part of a term, and the sums with it."""
        term, mean, share = self.problem.terms[number], self.means[number], self._shares[node]
        dim = term.dim(shift.axis) - 1
        others = torch.sub(mean.index_select(dim, shift.units), shift.before, alpha=share)
        if number in self._parts:
            self._parts[number] = self._parts[number] + share * dot(others, shift.after - shift.before)
        term.value[node].index_copy_(dim, shift.units, shift.after)
        mean.index_copy_(dim, shift.units, others.add_(shift.after, alpha=share))

    def change(self, number: int, node: int, index: Mapping[str, Tensor]) -> Tensor:
        """What permutations of some groups would change in a node's part of a term that they move, by its number."""
        term = self.problem.terms[number]
        here = self.places[node]
        places = {name: here[name] for name in term.groups if name in here and name not in index}
        return image(term, moved(term, term.value[node], index), places).sub_(self.node(term, node))

    def matrix(self, node: int, group: str) -> Tensor:
        """Where a group of a node stands, as a matrix relative to its frame."""
        place = self.places[node].get(group, FRAME)
        return matrix_of(place, self.problem.spec.groups[group].size, self.problem.like)

    def _changing(self, node: int, index: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a node's groups that permutations take elsewhere."""
        changed = {*self.places[node], *moving({k: rows for k, rows in index.items() if k not in self.places[node]})}
        return {name: rows for name, rows in index.items() if name in changed}

    def _mixtures(self, number: int, block: range, vertex: Vertex) -> list[list[float]]:
        """A term's part of the course: from its parts with every choice of axes at the vertex."""
        term, degree = self.problem.terms[number], len(self.problem.terms[number].groups)
        others = self.means[number].clone()
        sums = [torch.zeros_like(others) for _ in range(degree + 1)]
        squares = torch.zeros(2 * degree + 1, dtype=torch.float64, device=others.device)
        for row, node in enumerate(block):
            own = term.value[node]
            parts: list[Tensor] = [torch.zeros_like(others) for _ in range(degree + 1)]
            for chosen in product((False, True), repeat=degree):
                axes = [axis for axis, at_vertex in enumerate(chosen) if at_vertex]
                mixture = moved(term, own, _row(vertex, row), axes)
                parts[len(axes)] += image(term, mixture, self.places[node], without=axes)
            others.sub_(parts[0], alpha=self._shares[node])
            for total, part in zip(sums, parts, strict=True):
                total.add_(part, alpha=self._shares[node])
            squares -= self._shares[node] ** 2 * half_square(parts)
        towards = torch.stack([dot(others, each) for each in sums])
        curves = [towards] if len(block) == 1 else [towards, squares + half_square(sums)]
        return [power_basis(curve.tolist()) for curve in curves]


def _relative(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The permutations of a frame that make another one of it, where they move something."""
    index = {
        name: torch.argsort(rows)[after[name].to(rows)] if rows.ndim == 1 else after[name].to(rows) @ rows.T
        for name, rows in before.items()
    }
    return {name: index[name] for name in moving(index)}


def _row(vertex: Vertex, row: int) -> dict[str, Tensor]:
    """One node's permutations."""
    return {name: index[row] for name, index in vertex.items()}
