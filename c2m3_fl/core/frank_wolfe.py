"""C2M3: cycle-consistent matching of many networks by Frank-Wolfe over all layers and all nodes.

Crisostomi, Fumero, Baieri, Bernard, Rodolà: "C2M3: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024), Algorithm 1,
with sums over nodes instead of pairs of nodes, the exact step instead of a numerical search, and the relative duality
gap as the stopping rule. In the paper all nodes step together and zig-zag. Here they take turns (block-coordinate
Frank-Wolfe, Lacoste-Julien et al., ICML 2013), each against a universe that those before it have moved already: a pass
over all of them costs what one joint step costs and gains several times as much. The tail is left to the polish, which
goes on group by group. The whole steps of taking turns end sooner in a local optimum than the paper's short joint ones;
with more than three nodes the search therefore starts again from between what it has found and the barycentre, a few
times and from further every time, and keeps the better end (iterated local search).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.block_ascent import climb
from c2m3_fl.core.identity_proof import agreement_if_stationary
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.mapped import share_moved
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem, check_nodes, check_search
from c2m3_fl.core.result import Callback, Match, Step
from c2m3_fl.core.running import RunningUniverse
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start, begin, check_start, reheated
from c2m3_fl.core.state_dicts import order_by_units
from c2m3_fl.core.universe import Universe

__all__ = ["Found", "Limits", "Match", "Step", "Walk", "frank_wolfe", "match", "search"]

_FADING = 0.01  # share of the whole rise below which the polish gains more than another pass
_WARMTHS = (0.5, 0.6, 0.7)  # how far towards the barycentre to reheat: from .3 the same point is found again
_PASSES = 2  # of Frank-Wolfe from a reheated point; the polish does the rest
_FEW = 3  # free nodes up to which reheating gains too little for its time
_REHEATED = 15  # nodes to reheat in all: up to five with every warmth, from eight on once, more not at all


@dataclass(frozen=True, eq=False)
class Walk:
    """Where a Frank-Wolfe search has come to.

    Attributes
    ----------
    objectives : tuple of float
        The agreement at the start and after every pass.
    gap : float
        Relative duality gap, block by block, as the last pass met it.
    still : bool
        Whether the last pass has left every block where it stands.
    """

    objectives: tuple[float, ...]
    gap: float
    still: bool


def match(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    *,
    weights: Sequence[float] | Tensor | None = None,
    start: Start = "auto",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    polish: bool = True,
    together: int | None = 1,
    balance: bool = False,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Match:
    """Permute every node into one shared universe, where their weighted agreement is as large as can be found.

    The result depends on the nodes' contents, not on their order. A node of weight zero takes no part in the
    agreement and is aligned with the others all the same.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts that fit the spec; not mutated. Integer tensors and buffers take no part.
    weights : sequence of float, optional
        Averaging weights; equal by default.
    start : {"auto", "identity", "profiles", "barycentre", "sinkhorn", "random"} or sequence of Permutation
        Where the search starts; permutations are one per node, into a known universe. "profiles" compares every
        node's units with those of one of the nodes, whatever they are connected to; "auto" is "profiles" where the
        nodes agree more there than as they stand, and "identity" otherwise.
    max_steps : int
        Upper limit of Frank-Wolfe steps; one is a pass over all nodes. Every reheating may take two more.
    tolerance : float
        Stop when the duality gap is at most this share of ``sum_{i<j} w_i w_j |W_i| |W_j|``.
    polish : bool
        Whether to leave Frank-Wolfe when its steps fade, to climb on, block by block, and with more than three nodes
        to reheat. Without it the steps go on until the gap closes, and the point is rounded to permutations once.
    together : int, optional
        How many nodes step at once; None for all of them, as in the paper.
    balance : bool
        Whether every tensor counts the same, whatever its norm. The objectives are then those of the balanced
        agreement. It guards against one loud layer; on ordinary networks the plain agreement merges better.
    generator : torch.Generator, optional
        Source of the "sinkhorn" and "random" starts; by default one with seed 0.
    callback : callable, optional
        Called with a `Step` after every step, every sweep and every reheating that gained.

    Raises
    ------
    ParamsError
        For no nodes, or nodes that do not fit the spec, are not finite, or so large that the agreement overflows.
    WeightsError
        For weights that are negative, not finite, all zero or of the wrong number.
    ConfigError
        For an unknown start, a negative `max_steps` or `tolerance`, or a `together` below one.
    """
    check_nodes(spec, nodes)
    share = normalise_weights(weights, len(nodes))
    check_start(spec, start, len(nodes))
    check_search(max_steps, tolerance, together)
    order = order_by_units(spec, nodes, share, None if isinstance(start, str) else start)
    heavy = [i for i in order if share[i] > 0]
    if not isinstance(start, str) and all(permutation.is_identity(perm) for perm in start):
        start = "identity"
    if start in ("auto", "identity") and len(heavy) == len(nodes) and not balance:
        with torch.no_grad():
            here = agreement_if_stationary(spec, [nodes[i] for i in order], share[heavy])
        if here is not None:
            still = tuple(permutation.identity(spec) for _ in nodes)
            return Match(still, (here, here), 0.0, True, 0, order)
    with torch.no_grad(), assignment_pool() as pool:
        problem = Problem.of(spec, [nodes[i] for i in heavy], share[heavy], balance=balance)
        point, passed = begin(problem, start if isinstance(start, str) else [start[i] for i in heavy], generator)
        limits = Limits(max_steps, tolerance, polish, together)
        found = search(problem, point, pool, limits, callback)
        perms = dict(zip(heavy, found.permutations, strict=True))
        if len(heavy) < len(nodes):
            known = RunningUniverse(spec)
            for i in heavy:
                known.add(nodes[i], perms[i], float(share[i]))
            mean = known.mean(nodes[heavy[0]])
            for i in (i for i in order if share[i] == 0):
                alone = Problem.of(
                    spec, [mean, nodes[i]], torch.full((2,), 0.5, dtype=torch.float64), frozen=1, balance=balance
                )
                point, _ = begin(alone, start if isinstance(start, str) else [start[i]], generator)
                perms[i] = search(alone, point, pool, limits).permutations[1]
    in_order = tuple(perms[i] for i in range(len(nodes)))
    objectives = (*passed, *found.objectives)
    return Match(in_order, objectives, found.gap, found.gap <= tolerance, found.steps, order)


@dataclass(frozen=True)
class Limits:
    """When a search ends; see `match`."""

    max_steps: int
    tolerance: float
    polish: bool
    together: int | None = 1


@dataclass(frozen=True)
class Found:
    """What a search has found: permutations of the problem's nodes, in its order, and the course of the agreement."""

    permutations: tuple[Permutation, ...]
    objectives: tuple[float, ...]
    gap: float
    steps: int


def search(
    problem: Problem, point: dict[str, Tensor], pool: Executor, limits: Limits, callback: Callback | None = None
) -> Found:
    """The ascent from `point`, which moves along, and again from the best end so far, reheated more every time."""
    found = _ascend(problem, point, pool, limits, callback)
    free = problem.count - problem.frozen
    if not limits.polish or found.steps == 0 or free <= _FEW:
        return found
    short = replace(limits, max_steps=min(limits.max_steps, _PASSES))
    for warmth in _WARMTHS[: _REHEATED // free]:
        again = _ascend(problem, reheated(problem, found.permutations, warmth), pool, short)
        gained = again.objectives[-1] - found.objectives[-1]
        if not gained / problem.unit > torch.finfo(problem.like.dtype).eps:
            continue  # rounding is no gain
        objectives = (*found.objectives, again.objectives[-1])
        if callback is not None:
            moved = share_moved(_stacked(again.permutations), _stacked(found.permutations))
            callback(Step(len(objectives) - 1, objectives[-1], gained / problem.unit, 1.0, moved))
        found = replace(again, objectives=objectives, steps=found.steps)
    return found


def _ascend(
    problem: Problem, point: dict[str, Tensor], pool: Executor, limits: Limits, callback: Callback | None = None
) -> Found:
    """Frank-Wolfe from `point`, which moves along, and the climb from there."""
    universe = Universe(problem, point)
    walk = frank_wolfe(universe, pool, limits, fading=_FADING if limits.polish else 0.0, callback=callback)
    vertex, objectives, gap = climb(
        universe, walk, pool, polish=limits.polish, tolerance=limits.tolerance, callback=callback
    )
    perms = tuple({name: rows[i].cpu() for name, rows in vertex.items()} for i in range(problem.count))
    return Found(perms, objectives, gap, len(walk.objectives) - 1)


def _stacked(perms: Sequence[Permutation]) -> dict[str, Tensor]:
    return {name: torch.stack([perm[name] for perm in perms]) for name in perms[0]}


def frank_wolfe(
    universe: Universe,
    pool: Executor,
    limits: Limits,
    *,
    fading: float = 0.0,
    callback: Callback | None = None,
) -> Walk:
    """C2M3 Algorithm 1 from where the universe stands, which moves along; one step is a pass over all blocks.

    Stops early when a pass gains less than `fading` of the whole rise.
    """
    problem, objectives, gap, still = universe.problem, [universe.objective()], math.inf, False
    blocks = _blocks(problem, limits.together)
    while len(objectives) <= limits.max_steps and not _fades(objectives, fading):  # C2M3 Alg. 1, l. 2: repeat
        gap, step_sizes, moved = 0.0, [], 0.0
        for block in blocks:  # in the paper one block holds all nodes
            # l. 3: the gradient, for every group; l. 4: the permutations that maximise its linear functional
            others = universe.others(block)
            vertex = oracle(problem.spec, universe.gradient(block, others), pool)
            course = universe.course(block, others, vertex)
            slope = max(course[1], 0.0) / problem.unit  # <gradient, vertex - point>: the block's duality gap
            gap, moved = gap + slope, moved + share_moved(vertex, universe.vertex(block)) / len(blocks)
            if slope * len(blocks) > limits.tolerance:
                step_sizes.append(best_step(course)[0])  # l. 5: the line search, exactly
                universe.advance(block, others, vertex, step_sizes[-1])  # l. 6: step towards the vertex
        still = not step_sizes
        if still:  # l. 7: until converged
            break
        objectives.append(universe.objective())
        if callback is not None:
            step_size = sum(step_sizes) / len(step_sizes)
            callback(Step(len(objectives) - 1, objectives[-1], gap, step_size, moved))
    return Walk(tuple(objectives), gap, still)


def _blocks(problem: Problem, together: int | None) -> list[slice]:
    """The free nodes, so many at a time."""
    size = together or problem.count
    first = range(problem.frozen, problem.count, size)
    return [slice(start, min(start + size, problem.count)) for start in first]


def _fades(objectives: Sequence[float], fading: float) -> bool:
    return len(objectives) > 2 and objectives[-1] - objectives[-2] <= fading * (objectives[-1] - objectives[0])
