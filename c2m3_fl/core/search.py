"""The search: an ascent to permutations that no block improves, and reheatings that leave local optima.

An ascent is Frank-Wolfe until its passes fade, then block ascent, family by family. The whole steps of nodes that take
turns end sooner in a local optimum than the short joint steps of the paper. With more than three nodes the search
therefore starts again between the permutations found and the barycentre, each time closer to the barycentre, and keeps
the better end (iterated local search).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

import torch
from torch import Tensor

from c2m3_fl.core.assignment import oracle
from c2m3_fl.core.block_ascent import climb
from c2m3_fl.core.frank_wolfe import frank_wolfe
from c2m3_fl.core.mapped import share_moved
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.result import Callback, Found, Limits, Step
from c2m3_fl.core.starts import at_perms, soften
from c2m3_fl.core.universe import Point, Universe

FEW = 3  # nodes up to which nothing is reheated: it gained too little there for its work
# What reheatings may cost together: the first ascent's work of so many nodes, so that what they add to a match of many
# nodes vanishes. Counted, not timed, so that results can be reproduced. Over 47 matches of 4 to 20 nodes
# (`tests.benchmarks.reheating`) a reheating cost .6 to .8 of the first ascent's work, alike for all numbers of nodes.
# The first gained in 39 matches and raised the agreement by .12 % on average, the second and the third gained in 18
# and 19, by .05 % each. Twelve nodes' work lets three start with up to five nodes, which five digits MLPs need (.14 %),
# two with seven, one with ten, and none from sixteen on.
BUDGET = 12
# Nothing is reheated where the nodes agree by so large a share of the largest agreement that is conceivable, as copies
# of one network that were trained on do: there the first ascent has found their order. Of 31 matches of three networks
# that ended above .85 none gained by reheatings; of 28 that ended from .6 to .84 eight did (seeds that no table shows).
ALIKE = 0.85
_COST = 0.8  # of a reheating, as a share of the first ascent's work: one starts where so much is left
WARMTHS = (0.5, 0.6, 0.7)  # how far towards the barycentre to reheat: from .3 the same point is found again
PASSES = 2  # of Frank-Wolfe from a reheated point; the polish does the rest
_FADING = 0.01  # share of the whole rise below which the polish gains more than another pass


def search(problem: Problem, point: Point, pool: Executor, limits: Limits, callback: Callback | None = None) -> Found:
    """The ascent from a point, and the reheatings of its end.

    Parameters
    ----------
    problem : Problem
        What is to be matched.
    point : Point
        Where to start.
    pool : Executor
        Where assignment problems are solved.
    limits : Limits
        When to end.
    callback : callable, optional
        Called with a `Step` after every step.
    """
    found = ascend(problem, point, pool, limits, callback)
    if not limits.polish or limits.over or found.steps == 0 or problem.count - problem.frozen <= FEW:
        return found
    if found.objectives[-1] - problem.constant >= ALIKE * problem.scale:
        return found
    return reheat(problem, found, pool, limits, callback)


def expected_reheating(nodes: int) -> float:
    """The work that reheatings of so many moving nodes are expected to cost, as a share of the first ascent's."""
    return 0.0 if nodes <= FEW else _COST * min(len(WARMTHS), int(BUDGET / (_COST * nodes)))


def ascend(problem: Problem, point: Point, pool: Executor, limits: Limits, callback: Callback | None = None) -> Found:
    """Frank-Wolfe from a point and the block ascent from there; the parameters are those of `search`."""
    universe = Universe(problem, point)
    course = frank_wolfe(universe, pool, limits, fading=_FADING if limits.polish else 0.0, callback=callback)
    objectives = climb(universe, course, pool, limits, callback)
    perms = tuple(
        {name: rows.to("cpu", copy=True) for name, rows in problem.frame(i).items()} for i in range(problem.count)
    )
    return Found(perms, objectives, problem.gain(objectives), len(course.objectives) - 1, universe.work)


def reheat(problem: Problem, found: Found, pool: Executor, limits: Limits, callback: Callback | None = None) -> Found:
    """Ascend again from softened permutations while the budget lasts, and keep what is higher.

    Parameters
    ----------
    problem, pool, limits, callback
        See `search`.
    found : Found
        The end of the first ascent.
    """
    short = replace(limits, max_steps=min(limits.max_steps, PASSES))
    first, budget = found.work, found.work * BUDGET / (problem.count - problem.frozen)
    for warmth in WARMTHS:
        if limits.over or found.work - first + _COST * first > budget:
            break
        tell = None if callback is None else _trial(callback, found.work)
        again = ascend(problem, soften(problem, found.permutations, warmth), pool, short, tell)
        work, gain = found.work + again.work, (again.objectives[-1] - found.objectives[-1]) / problem.unit
        if not gain > torch.finfo(problem.like.dtype).eps:
            found = replace(found, work=work)
            continue  # rounding is not a gain
        objectives = (*found.objectives, again.objectives[-1])
        if callback is not None:
            moved = share_moved(_stacked(again.permutations), _stacked(found.permutations))
            callback(Step(len(objectives) - 1, objectives[-1], None, gain, 1.0, moved, problem.count, work))
        found = Found(again.permutations, objectives, gain, found.steps, work)
    return found


def duality_gap(problem: Problem, permutations: Sequence[Permutation], pool: Executor) -> float:
    """Relative Frank-Wolfe duality gap at permutations: ``max_S <gradient, S - P>``, at the cost of one pass.

    Parameters
    ----------
    problem : Problem
        What is matched.
    permutations : sequence of Permutation
        One per node, those of frozen nodes included.
    pool : Executor
        Where assignment problems are solved.
    """
    universe = Universe(problem, at_perms(problem, permutations))
    gap = 0.0
    for node in range(problem.frozen, problem.count):
        gradient = universe.gradient(range(node, node + 1))
        best = oracle(problem.spec, gradient, pool)
        gap += float(problem.weights[node]) * universe.gain(node, gradient, best)
    return max(gap, 0.0) / problem.unit


def _trial(callback: Callback, work: int) -> Callback:
    """A callback for the steps of a reheating, after so much work."""
    return lambda step: callback(replace(step, trial=True, work=work + step.work))


def _stacked(perms: Sequence[Permutation]) -> dict[str, Tensor]:
    return {name: torch.stack([perm[name] for perm in perms]) for name in perms[0]}
