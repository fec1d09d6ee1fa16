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
from c2m3_fl.core.gradients import Gradients
from c2m3_fl.core.mapped import inner, share_moved
from c2m3_fl.core.places import worth
from c2m3_fl.core.problem import Problem, work_of
from c2m3_fl.core.result import Callback, Course, Limits, Step
from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.core.universe import Universe

TAIL = 0.1  # sweeps go on below the tolerance: their gains shrink slowly and add up
_ROUNDING = 4  # gains below this many units of rounding are no improvement


def climb(
    universe: Universe, course: Course, pool: Executor, limits: Limits, callback: Callback | None = None
) -> tuple[float, ...]:
    """From the end of a Frank-Wolfe ascent to permutations, and up from there until a sweep gains next to nothing.

    Parameters
    ----------
    universe : Universe
        Where the ascent ended; it moves along, to the permutations.
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
    tuple of float
        The objectives of the course, continued with one for every sweep.
    """
    ascent = BlockAscent(universe, pool)
    problem, objectives, least = universe.problem, list(course.objectives), TAIL * limits.tolerance
    soft = not ascent.at_vertex
    moves = soft or (limits.polish and not limits.over and not (course.still and course.gap <= least))
    while moves:
        before = {} if callback is None else {name: index.clone() for name, index in problem.frames.items()}
        moves = ascent.sweep(limits)
        objectives.append(universe.add_up(anew=False))
        gain = problem.gain(objectives)
        moves &= limits.polish and not limits.over and (soft or gain > least)
        soft = False
        if callback is not None:
            moved = share_moved(problem.frames, before)
            callback(Step(len(objectives) - 1, objectives[-1], None, gain, 1.0, moved, problem.count, universe.work))
    if len(objectives) > len(course.objectives):
        objectives[-1] = universe.add_up()
    return tuple(objectives)


class BlockAscent:
    """The state of the ascent: the universe, and when each of its blocks was last best.

    Parameters
    ----------
    universe : Universe
        Where the ascent starts; it moves along.
    pool : Executor
        Where assignment problems are solved.
    """

    def __init__(self, universe: Universe, pool: Executor) -> None:
        self._universe, self._pool, self._problem = universe, pool, universe.problem
        self._gradients = Gradients(universe)
        self._colours = [_Colour(self._problem, roots) for roots in _colouring(self._problem)]
        self._clock = 0
        self._changed = [0] * len(self._problem.terms)
        self._best_since: dict[tuple[int, int], int] = {}

    @property
    def at_vertex(self) -> bool:
        """Whether every node is at permutations."""
        return not any(self._universe.places)

    def sweep(self, limits: Limits | None = None) -> bool:
        """Move every block once; whether any of them moved. The first sweep ends at permutations.

        When the time is up, only nodes that are not at permutations yet move.
        """
        moved = False
        for node in range(self._problem.frozen, self._problem.count):
            soft = bool(self._universe.places[node])
            if not soft and limits is not None and limits.over:
                continue
            for number, colour in enumerate(self._colours):
                newest = max((self._changed[t] for t in colour.touched), default=0)
                if not soft and self._best_since.get((node, number), -1) >= newest:
                    continue  # nothing that these blocks see has changed since they were last best
                here = self._round(node, colour) if soft else self._improve(node, colour)
                moved |= here
                if not (here and colour.twice):  # families on two axes of a tensor: the gain was not linear, look again
                    self._best_since[node, number] = self._clock
        return moved

    def _round(self, node: int, colour: _Colour) -> bool:
        """Put a soft node's blocks of one colour at the oracle's answer, or at the nearest one where it would lose."""
        gains = self._gains(node, colour)
        proposal = self._oracle(colour.spec, gains)
        for root, family in colour.families.items():
            if root in colour.twice and self._exact_gain(node, colour, root, proposal) < 0:
                soft = {name: self._universe.matrix(node, name) for name in family}
                proposal.update(
                    self._oracle(PermutationSpec({name: colour.spec.groups[name] for name in family}, {}), soft)
                )
            self._accept(node, colour, root, proposal)
        return True

    def _improve(self, node: int, colour: _Colour) -> bool:
        """Move one node's blocks of one colour where that raises the agreement by more than rounding."""
        gains = self._gains(node, colour)
        proposal = self._oracle(colour.spec, gains)
        names = list(colour.spec.groups)
        here = torch.stack([worth(gains[name], None) for name in names])
        there = torch.stack([worth(gains[name], proposal[name]) for name in names])
        rise = dict(zip(names, zip(here.tolist(), (there - here).tolist(), strict=True), strict=True))
        rounding = _ROUNDING * torch.finfo(gains[names[0]].dtype).eps
        moved = False
        for root, family in colour.families.items():
            gain = sum(rise[name][1] for name in family)
            noise = rounding * sum(abs(rise[name][0]) + abs(rise[name][1]) for name in family)
            if gain > noise and root in colour.twice:
                gain = self._exact_gain(node, colour, root, proposal)
            if gain > noise:
                self._accept(node, colour, root, proposal)
                moved = True
            elif root in colour.turning and gain > -noise:
                self._accept(node, colour, root, proposal)  # the angle of a rotation is more precise than its gain
        return moved

    def _gains(self, node: int, colour: _Colour) -> dict[str, Tensor]:
        """The gradient of one node's blocks, the node's weight left out."""
        self._universe.work += colour.work
        return self._gradients.of(node, colour.spec.groups, colour.touched)

    def _oracle(self, spec: PermutationSpec, gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = oracle(spec, {name: gain[None] for name, gain in gains.items()}, self._pool)
        return {name: index[0] for name, index in found.items()}

    def _exact_gain(self, node: int, colour: _Colour, root: str, proposal: Mapping[str, Tensor]) -> float:
        index = {name: proposal[name] for name in colour.families[root]}
        return sum(
            inner(self._universe.others(t, node), self._universe.change(t, node, index))
            for t in colour.touched_by[root]
        )

    def _accept(self, node: int, colour: _Colour, root: str, proposal: Mapping[str, Tensor]) -> None:
        self._clock += 1
        self._gradients.settle(node, {name: proposal[name] for name in colour.families[root]})
        for t in colour.touched_by[root]:
            self._changed[t] = self._clock


class _Colour:
    """Families that share no term, and the terms that each of them touches."""

    def __init__(self, problem: Problem, roots: Sequence[str]) -> None:
        spec = problem.spec
        self.families = {root: (root, *spec.children(root)) for root in roots}
        self.touched_by = {root: problem.touched(family) for root, family in self.families.items()}
        self.touched = [t for touched in self.touched_by.values() for t in touched]
        groups: dict[str, Group] = {name: spec.groups[name] for family in self.families.values() for name in family}
        self.spec = PermutationSpec(groups, {})
        self.work = work_of(groups, [problem.terms[t] for t in self.touched])
        self.twice = {  # families that some term carries on more than one axis
            root
            for root, family in self.families.items()
            if any(sum(group in family for group in problem.terms[t].groups) > 1 for t in self.touched_by[root])
        }
        self.turning = {  # families of which a part rotates, and whose answers lose nothing
            root
            for root, family in self.families.items()
            if root not in self.twice and any(groups[name].orthogonal for name in family)
        }


def _colouring(problem: Problem) -> list[list[str]]:
    """Greedy: every family takes the first colour none of whose terms it touches."""
    colours: list[tuple[list[str], set[int]]] = []
    for root in problem.spec.roots:
        touched = set(problem.touched((root, *problem.spec.children(root))))
        for roots, taken in colours:
            if not taken & touched:
                roots.append(root)
                taken |= touched
                break
        else:
            colours.append(([root], touched))
    return [roots for roots, _ in colours]
