"""Block-coordinate ascent: one node and one family of groups at a time against the universe of the others.

A *family* is a group without a parent together with the groups nested in it. The agreement is linear in one node's
permutation of one family as long as no tensor carries the family on two axes; then the oracle's answer is the best for
this block. From a soft point a sweep then ends at permutations without loss; from permutations it climbs until no block
can improve, where the duality gap of Frank-Wolfe is zero. Where a tensor carries a family twice, the answer is a
proposal: it is accepted only if it raises the agreement, and a gap may remain. Families that share no term do not
affect each other, so each node moves a *colour* of several families at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from c2m3_fl.core.assignment import oracle
from c2m3_fl.core.mapped import contract, gather, inner, share_moved, vertex_of
from c2m3_fl.core.problem import work_of
from c2m3_fl.core.result import Callback, Course, Limits, Step
from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.core.terms import Term
from c2m3_fl.core.universe import Universe

TAIL = 0.1  # sweeps go on below the tolerance: their gains shrink slowly and add up
_ROUNDING = 4  # gains below this many units of rounding are no improvement


def climb(
    universe: Universe, course: Course, pool: Executor, limits: Limits, callback: Callback | None = None
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """From the end of a Frank-Wolfe ascent to permutations, and up from there until a sweep gains next to nothing.

    Parameters
    ----------
    universe : Universe
        Where the ascent ended; its mapped tensors move along.
    course : Course
        The course of the ascent.
    pool : Executor
        Where assignment problems are solved.
    limits : Limits
        The tolerance, and whether to go on from the first permutations.
    callback : callable, optional
        Called with a `Step` after every sweep.

    Returns
    -------
    vertex : dict of str to Tensor, shape (nodes, size)
        The permutations.
    objectives : tuple of float
        Those of the course, continued with one for every sweep.
    """
    ascent = BlockAscent(universe, pool)
    problem, objectives, least = universe.problem, list(course.objectives), TAIL * limits.tolerance
    soft = not ascent.at_vertex
    moves = soft or (limits.polish and not limits.over and not (course.still and course.gap <= least))
    while moves:
        before = {name: index.clone() for name, index in ascent.vertex.items()}
        moves = ascent.sweep(limits)
        objectives.append(universe.objective())
        gain = problem.gain(objectives)
        moves &= limits.polish and not limits.over and (soft or gain > least)
        soft = False
        if callback is not None:
            moved = share_moved(ascent.vertex, before)
            callback(Step(len(objectives) - 1, objectives[-1], None, gain, 1.0, moved, problem.count, universe.work))
    return ascent.vertex, tuple(objectives)


class BlockAscent:
    """The state of the ascent: the universe and the permutations found so far.

    Parameters
    ----------
    universe : Universe
        Where the ascent starts; its mapped tensors move along, its point does not.
    pool : Executor
        Where assignment problems are solved.
    """

    def __init__(self, universe: Universe, pool: Executor) -> None:
        problem, point, mapped = universe.problem, universe.point, universe.mapped
        spec, weights = problem.spec, problem.weights
        self._pool, self._weights, self._soft, self._frozen = pool, weights.tolist(), point, problem.frozen
        self.vertex = universe.vertex(slice(0, problem.count))
        self._rounded = [
            vertex_of({name: matrices[i] for name, matrices in point.items()}) is not None for i in range(len(weights))
        ]
        self._universe = universe
        self._terms = [each.term for each in mapped]
        self._maps = [each.maps for each in mapped]
        self._means = universe.means
        touched = _touched_by_family(spec, self._terms)
        self._colours = [_Colour(spec, roots, self._terms, touched) for roots in _colouring(spec, touched)]
        self._clock = 0
        self._changed = [0] * len(mapped)
        self._best_since: dict[tuple[int, int], int] = {}

    @property
    def at_vertex(self) -> bool:
        """Whether every node is at permutations."""
        return all(self._rounded)

    def sweep(self, limits: Limits | None = None) -> bool:
        """Move every block once; whether any of them moved. The first sweep ends at permutations.

        When the time is up, only nodes that are not at permutations yet move.
        """
        moved = False
        for node in range(self._frozen, len(self._weights)):
            if self._rounded[node] and limits is not None and limits.over:
                continue
            for number, colour in enumerate(self._colours):
                newest = max((self._changed[t] for t in colour.touched), default=0)
                if self._best_since.get((node, number), -1) >= newest:
                    continue  # nothing that these blocks see has changed since they were last best
                here = self._move(node, colour)
                moved |= here
                if not (here and colour.twice):  # families on two axes of a tensor: the gain was not linear, look again
                    self._best_since[node, number] = self._clock
            self._rounded[node] = True
        return moved

    def _move(self, node: int, colour: _Colour) -> bool:
        """Move one node's blocks of one colour to where they are best; whether any of them moved."""
        weight = self._weights[node]
        self._universe.work += colour.work
        others = {t: torch.sub(self._means[t], self._maps[t][-1][node], alpha=weight) for t in colour.touched}
        gains = self._gains(node, colour, others)
        proposal = _vertex(oracle(colour.spec, {name: gain[None] for name, gain in gains.items()}, self._pool))
        if not self._rounded[node]:
            return self._round(node, colour, others, proposal)
        better = self._improvements(node, colour, others, gains, proposal)
        for root in better:
            self._accept(node, colour, root, others, proposal)
        return bool(better)

    def _round(self, node: int, colour: _Colour, others: Mapping[int, Tensor], proposal: dict[str, Tensor]) -> bool:
        """From a soft point: to the proposal, or to the nearest permutations where it would lose."""
        for root, family in colour.families.items():
            if root in colour.twice and self._exact_gain(node, colour, root, others, proposal) < 0:
                groups = {name: colour.spec.groups[name] for name in family}
                soft = {name: self._soft[name][node][None] for name in family}
                proposal.update(_vertex(oracle(PermutationSpec(groups, {}), soft, self._pool)))
            self._accept(node, colour, root, others, proposal)
        return True

    def _improvements(
        self,
        node: int,
        colour: _Colour,
        others: Mapping[int, Tensor],
        gains: Mapping[str, Tensor],
        proposal: Mapping[str, Tensor],
    ) -> list[str]:
        """The families whose proposal raises the agreement by more than rounding."""
        names = list(colour.spec.groups)
        here = torch.stack([_worth(gains[name], self.vertex[name][node]) for name in names])
        there = torch.stack([_worth(gains[name], proposal[name]) for name in names])
        worth = dict(zip(names, zip(here.tolist(), (there - here).tolist(), strict=True), strict=True))
        rounding = _ROUNDING * torch.finfo(gains[names[0]].dtype).eps
        better = []
        for root, family in colour.families.items():
            gain = sum(worth[name][1] for name in family)
            noise = rounding * sum(abs(worth[name][0]) + abs(worth[name][1]) for name in family)
            if gain > noise and root in colour.twice:
                gain = self._exact_gain(node, colour, root, others, proposal)
            if gain > noise:
                better.append(root)
        return better

    def _gains(self, node: int, colour: _Colour, others: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The gradient of one node's blocks, the node's weight factored out."""
        like = self._soft[next(iter(colour.spec.groups))]
        sizes = {name: group.size for name, group in colour.spec.groups.items()}
        gains = {name: like.new_zeros(size, size) for name, size in sizes.items()}
        for t, other in others.items():
            term, maps = self._terms[t], self._maps[t]
            for axis, group in enumerate(term.groups):
                if group in gains:
                    rest = maps[(len(maps) - 1) & ~(1 << axis)][node]
                    contract(other[None], rest[None], term.dim(axis), gains[group][None])
        return gains

    def _exact_gain(
        self, node: int, colour: _Colour, root: str, others: Mapping[int, Tensor], proposal: Mapping[str, Tensor]
    ) -> float:
        return sum(
            inner(others[t], self._mapped(t, node, colour.families[root], proposal)[-1] - self._maps[t][-1][node])
            for t in colour.touched_by[root]
        )

    def _accept(
        self, node: int, colour: _Colour, root: str, others: Mapping[int, Tensor], proposal: Mapping[str, Tensor]
    ) -> None:
        self._clock += 1
        for t in colour.touched_by[root]:
            for mask, tensor in enumerate(self._mapped(t, node, colour.families[root], proposal)):
                if mask:
                    self._maps[t][mask][node] = tensor
            torch.add(others[t], self._maps[t][-1][node], alpha=self._weights[node], out=self._means[t])
            self._changed[t] = self._clock
        for name in colour.families[root]:
            self.vertex[name][node] = proposal[name]

    def _mapped(self, t: int, node: int, family: Sequence[str], proposal: Mapping[str, Tensor]) -> list[Tensor]:
        """One node's mapped tensors of a term after its family has moved to `proposal`."""
        term, maps = self._terms[t], self._maps[t]
        result = [maps[0][node]]
        for mask in range(1, len(maps)):
            axes = [axis for axis, group in enumerate(term.groups) if mask >> axis & 1 and group in family]
            if not axes:
                result.append(maps[mask][node])
                continue
            source, index = result[mask & ~(1 << axes[0])], proposal[term.groups[axes[0]]]
            result.append(gather(source[None], term.dim(axes[0]), index[None])[0])
        return result


class _Colour:
    """Families that share no term, and the terms that each of them touches."""

    def __init__(
        self,
        spec: PermutationSpec,
        roots: Sequence[str],
        terms: Sequence[Term],
        touched: Mapping[str, Sequence[int]],
    ) -> None:
        self.families = {root: (root, *spec.children(root)) for root in roots}
        self.touched_by = {root: touched[root] for root in roots}
        self.touched = [t for touched in self.touched_by.values() for t in touched]
        groups: dict[str, Group] = {name: spec.groups[name] for family in self.families.values() for name in family}
        self.spec = PermutationSpec(groups, {})
        self.work = work_of(groups, [terms[t] for t in self.touched])
        self.twice = {  # families that some term carries on more than one axis
            root
            for root, family in self.families.items()
            if any(sum(group in family for group in terms[t].groups) > 1 for t in self.touched_by[root])
        }


def _colouring(spec: PermutationSpec, touched_by: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Greedy: every family takes the first colour none of whose terms it touches."""
    colours: list[tuple[list[str], set[int]]] = []
    for root in spec.roots:
        touched = set(touched_by[root])
        for roots, taken in colours:
            if not taken & touched:
                roots.append(root)
                taken |= touched
                break
        else:
            colours.append(([root], touched))
    return [roots for roots, _ in colours]


def _touched_by_family(spec: PermutationSpec, terms: Sequence[Term]) -> dict[str, list[int]]:
    """Per group without a parent, the terms that carry it or a group nested in it, in order."""
    root = {name: group.parent or name for name, group in spec.groups.items()}
    found: dict[str, list[int]] = {name: [] for name in spec.roots}
    for t, term in enumerate(terms):
        for name in dict.fromkeys(root[group] for group in term.groups):
            found[name].append(t)
    return found


def _worth(gain: Tensor, index: Tensor) -> Tensor:
    return gain.gather(1, index[:, None]).sum(dtype=torch.float64)


def _vertex(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: index[0] for name, index in found.items()}
